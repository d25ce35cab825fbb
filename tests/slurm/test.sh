#!/bin/sh
# `make slurm-test`: runs the job scripts of this folder on a Slurm of one machine, which is started here for this
# purpose, on the loopback interface with ports, key and state of its own, and stopped at the end. Shards must join to
# the bytes of one run, also where a shard was killed and requeued; a shard that fails must leave no statistics.
# Needs root, slurmctld, slurmd and munged (Debian: slurm-wlm and munge).
set -eu
export LC_ALL=C
cd "$(dirname "$0")/../.."
root=$PWD jobs=$PWD/tests/slurm shards=4
passed=0 failed=0 skipped=0

skip() {
    echo "skipped: $*"
    skipped=$((skipped + 1))
}
check() {                                        # FAULT COMMAND...: counts the command's outcome
    fault=$1
    shift
    if "$@" >>"$folder/checks" 2>&1; then passed=$((passed + 1)); return 0; fi
    failed=$((failed + 1))
    echo "FAILED: $fault"
}
finish() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [ $failed -eq 0 ]
}
PATH=$PATH:/usr/sbin:/sbin
for tool in munged slurmctld slurmd sbatch scontrol; do
    command -v $tool >/dev/null && continue
    skip "the Slurm jobs: $tool is missing (Debian: apt-get install slurm-wlm munge)"
    finish
    exit
done
if [ "$(id -u)" != 0 ]; then
    skip "the Slurm jobs: Slurm and munge are installed, but only root can start them"
    finish
    exit
fi

# The daemons, in the foreground of this shell's background, so that they can be stopped by their numbers.
folder=$(mktemp -d "${TMPDIR:-/tmp}/saeclip-slurm-XXXXXX")
daemons='' started=''
nothing_queued() { [ -z "$(squeue --noheader)" ]; }
stop() {                                         # jobs first: slurmd waits for those that still run
    trap '' INT TERM HUP
    if [ "$started" ]; then
        scancel --user=root || :
        until_true 20 nothing_queued || :
    fi
    for daemon in $daemons; do kill "$daemon" 2>/dev/null || :; done
    until_true 20 all_ended || for daemon in $daemons; do kill -9 "$daemon" 2>/dev/null || :; done
    rm -rf "$folder"
}
all_ended() { for daemon in $daemons; do ! kill -0 "$daemon" 2>/dev/null || return 1; done; }
trap stop EXIT
trap 'exit 1' INT TERM HUP
start() {                                        # NAME COMMAND...
    name=$1
    shift
    "$@" >"$folder/$name.log" 2>&1 </dev/null &
    daemons="$! $daemons"                        # the last one is stopped first
}
until_true() {                                   # SECONDS COMMAND...
    left=$((5 * $1))
    shift
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || return 1
        sleep 0.2
    done
}
mkdir "$folder/munge" "$folder/state" "$folder/spool"
chmod 755 "$folder" "$folder/munge"
(umask 077; head -c 1024 /dev/urandom >"$folder/munge/key")
export SLURM_CONF="$folder/slurm.conf"
cat >"$SLURM_CONF" <<CONF
ClusterName=saeclip
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 5 seconds, not 120.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=1
ReturnToService=2
KillWait=2
# As many processors and as much memory as the tests ask for, whatever the machine has.
SlurmdParameters=config_overrides
NodeName=node NodeHostname=$(hostname) NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
start munged munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --num-threads=2
start slurmctld sh -c "while [ ! -S '$folder/munge/socket' ]; do sleep 0.1; done; exec slurmctld -D -c"
start slurmd sh -c "while [ ! -S '$folder/munge/socket' ]; do sleep 0.1; done; exec slurmd -D -N node"
idle() { [ "$(sinfo --noheader --format=%T)" = idle ]; }
if ! until_true 60 idle; then
    tail -n 5 "$folder"/*.log
    skip "the Slurm jobs: the daemons do not work here (their last messages are above)"
    finish
    exit
fi

started=yes

# What one run gives.
exec 3>&1 >>"$folder/checks"
tests/synth draw -o "$folder/world" --count 60 --seed 3
cd "$folder"
find "$folder/world/pictures" -name '*.ppm' | sort >images.txt
export MODEL="$root/weights/demo.safetensors" IMAGES="$folder/images.txt" SAE="$folder/sae" SAECLIP="$root/saeclip"
"$SAECLIP" extract -m "$MODEL" images.txt --quiet -o acts
"$SAECLIP" train --acts acts --arch topk --k 8 --expansion 2 --steps 8 --warmup 2 --quiet -o sae
"$SAECLIP" stats -s sae --acts acts --quiet -o whole
exec >&3

submit() { sbatch --parsable --cpus-per-task=1 "$@"; }
wait_for() { timeout 300 sbatch --wait --cpus-per-task=1 "$@"; }
same_as_one_run() {                              # FOLDER
    cmp "$1/stats.safetensors" whole && "$SAECLIP" compare "$1/stats.safetensors" whole
}
rows() {                                         # FILE: the bytes of its only tensor, which follow the header
    tail -c +$((9 + $(od -A n -t u8 -N 8 "$1"))) "$1"
}

# The activations of the parts of a list, joined, are those of the whole list.
OUT=parts
export OUT
check "the extract jobs fail" wait_for --array=1-$shards "$jobs/extract.sbatch"
for part in 1 2 3 4; do rows "parts/acts-$part.safetensors"; done >joined 2>>checks || :
rows acts >all
check "the parts' activations are not those of one run" cmp joined all

# Shards from images and from activations, with a merge that waits for them.
for OUT in from-images from-acts; do
    DATA="-m $MODEL $IMAGES"
    [ $OUT = from-images ] || DATA="--acts acts"
    export DATA
    job=$(submit --array=1-$shards "$jobs/stats.sbatch")
    check "$OUT: the merge fails" wait_for --dependency="afterok:$job" --kill-on-invalid-dep=yes "$jobs/merge.sbatch"
    check "$OUT: the shards do not join to one run's bytes" same_as_one_run $OUT
done

# Shard 2 is killed with kill -9 and its task requeued, as Slurm does when a machine fails; it had left a piece of a
# file. Shard 3 fails until the file `mended` exists.
cat >faulty <<PROGRAM
#!/bin/sh
if [ "\$SLURM_JOB_NAME-\$SLURM_ARRAY_TASK_ID" = stats-2 ] && [ "\$OUT" = requeued ]; then
    if [ "\${SLURM_RESTART_COUNT:-0}" = 0 ]; then
        "$SAECLIP" "\$@" &
        kill -9 \$!
        echo half >requeued/shard-2.safetensors.tmp
        touch killed
        sleep 600
    fi
    touch restarted
fi
[ "\$SLURM_JOB_NAME-\$SLURM_ARRAY_TASK_ID-\$OUT" != stats-3-failed ] || [ -f mended ] || exit 1
exec "$SAECLIP" "\$@"
PROGRAM
chmod +x faulty
SAECLIP=./faulty OUT=requeued
job=$(submit --array=1-$shards "$jobs/stats.sbatch")
check "shard 2 does not start" until_true 60 test -f killed
check "shard 2 cannot be requeued" scontrol requeue "${job}_2"
check "after a requeued shard the merge fails" wait_for --dependency="afterok:$job" --kill-on-invalid-dep=yes \
    "$jobs/merge.sbatch"
check "the requeued shard did not run twice" test -f restarted
SAECLIP="$root/saeclip"
check "with a requeued shard, other bytes" same_as_one_run requeued

# A shard that fails: no merge and no statistics. It is run again alone, as README.md says, and then merged.
SAECLIP=./faulty OUT=failed
job=$(submit --array=1-$shards "$jobs/stats.sbatch")
wait_for --dependency="afterok:$job" --kill-on-invalid-dep=yes "$jobs/merge.sbatch" >>checks 2>&1 || :
check "the other shards do not end" until_true 60 nothing_queued
check "the other shards are not there" test -f failed/shard-1.safetensors -a -f failed/shard-4.safetensors
check "statistics without shard 3" test ! -f failed/stats.safetensors
touch mended
export SHARDS=$shards
check "shard 3 alone fails" wait_for --array=3 "$jobs/stats.sbatch"
check "the late merge fails" wait_for "$jobs/merge.sbatch"
unset SHARDS
SAECLIP="$root/saeclip"
check "with a late shard, other bytes" same_as_one_run failed

# The same without Slurm.
if parallel --version 2>/dev/null | grep -q '^GNU parallel'; then
    OUT=parallel
    mkdir $OUT
    seq $shards | parallel --will-cite -j 2 "$SAECLIP" stats -s "$SAE" "$DATA" --shard {}/$shards --quiet \
        -o $OUT/shard-{}.safetensors >>checks 2>&1 || :
    check "GNU parallel: the merge fails" "$SAECLIP" merge $OUT/shard-*.safetensors --quiet -o $OUT/stats.safetensors
    check "GNU parallel: the shards do not join to one run's bytes" same_as_one_run $OUT
else
    skip "GNU parallel, which is not installed (Debian: parallel)"
fi
[ $failed = 0 ] || cat checks ./*-*.log
finish
