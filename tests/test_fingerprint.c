/* The checksum of what the program computes (tests/fingerprint.sh) is the one that README.md prints, for users
 * to compare theirs with. It changes where a number changes, or a file's layout: see which before README does. */

static void test_fingerprint(void)
{
    char line[200] = "";
    FILE *script = popen("sh tests/fingerprint.sh", "r");
    if (!script) need("sh");
    while (fgets(line, sizeof line, script)) continue;
    if (!check(pclose(script) == 0 && strncmp(line, "fingerprint ", 12) == 0,
               "tests/fingerprint.sh, which needs tests/synth, ends with '%s'", line)) return;
    const char *readme = get_file("README.md", NULL);
    check(readme && strstr(readme, line), "README.md does not have this machine's %s", line);
}
