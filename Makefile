# saeclip needs a C11 compiler and POSIX; nothing else, neither to build nor to run.
#     make CC=aarch64-linux-gnu-gcc CFLAGS_EXTRA=-static        as an example

CFLAGS  = -O3
PREFIX  = /usr/local
INSTALL = install

# Fused and reordered floating-point operations would change results: these flags keep them out.
EXACT  = -std=c11 -ffp-contract=off -fno-math-errno -fno-trapping-math
POSIX  = -D_POSIX_C_SOURCE=200809L -D_FILE_OFFSET_BITS=64
WARN   = -Wall -Wextra -Wpedantic -Wshadow -Wvla
FLAGS  = $(EXACT) $(POSIX) $(WARN) -pthread
BUILD  = $(CC) $(FLAGS) $(CFLAGS) $(CFLAGS_EXTRA)
LIBS   = -lm
# What only the tests add: they call part of the functions that are static.
TEST   = -Wno-unused-function
GUARD  = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
RACES  = -O1 -g -fsanitize=thread
SOURCE = saeclip.c saeclip.h
TESTS  = tests/test.c tests/check.h tests/test_*.c

.PHONY: all demo report test check fuzz fuzz-seeds faults coverage bench fingerprint portability install \
        clean help

all: saeclip

saeclip: $(SOURCE)
	$(BUILD) -o $@ saeclip.c $(LIBS)

tests/test: $(SOURCE) $(TESTS)
	$(BUILD) $(TEST) -o $@ tests/test.c $(LIBS)

# Pictures with known answers; see its head. -O1 is fast enough and compiles in a quarter of the time.
tests/synth: $(SOURCE) tests/synth.c
	$(BUILD) -O1 $(TEST) -DSAECLIP_NO_MAIN -o $@ tests/synth.c saeclip.c $(LIBS)

# The whole method, into out/: on pictures that are drawn for it and the small model in weights/, or on
# the user's own with MODEL=FILE IMAGES=DIR. LATENTS=J,J,... get a sheet, by default twelve that know best
# what is drawn, or are strongest on the first photo. CLASS=C: masks of its mean, not of the first photo.
MODEL     = weights/demo.safetensors
IMAGES    =
PICTURES  = 2000
UNSEEN    = 500
EXPANSION = 4
EPOCHS    = 4
LATENTS   =
CLASS     =
demo: saeclip tests/synth
	@MODEL="$(MODEL)" IMAGES="$(IMAGES)" PICTURES=$(PICTURES) UNSEEN=$(UNSEEN) EXPANSION=$(EXPANSION) \
	    EPOCHS=$(EPOCHS) LATENTS="$(LATENTS)" CLASS="$(CLASS)" tests/demo.sh

# The report, whole: make report MODEL=clip.safetensors TRAIN=photos VAL=others OUT=report. Photos are folders,
# lists or packed sets; they are resized to SQUARE first, as pack does. KEEP=1 keeps the activations, 0.6 MB
# an image of ViT-B/16, and spares the model ten of twelve passes. REPORTED: a file with the report's own table.
# CLASS and LATENTS=J,J,... are figure 6's: a class of VAL, by number; by default its first photo's strongest.
TRAIN    =
VAL      =
OUT      =
LAYER    = -2
SQUARE   = 256
BATCH    = 16
LR       = 4e-4
WARMUP   = 500
L1       = 8e-5
K        = 32
KEEP     =
REPORTED =
report: EXPANSION = 64
report: EPOCHS    = 1
report: CLASS     = 0
report: saeclip
	@MODEL="$(MODEL)" TRAIN="$(TRAIN)" VAL="$(VAL)" OUT="$(OUT)" LAYER=$(LAYER) SQUARE=$(SQUARE) BATCH=$(BATCH) \
	    LR=$(LR) WARMUP=$(WARMUP) L1=$(L1) K=$(K) EXPANSION=$(EXPANSION) EPOCHS=$(EPOCHS) LATENTS="$(LATENTS)" \
	    CLASS="$(CLASS)" KEEP=$(KEEP) REPORTED="$(REPORTED)" tests/report.sh

test: saeclip tests/test tests/synth
	tests/test

build/guard_saeclip build/guard_test build/guard_synth: MODE = $(GUARD)
build/races_saeclip build/races_test: MODE = $(RACES)

build/guard_saeclip build/races_saeclip: $(SOURCE)
	@mkdir -p build
	$(BUILD) $(MODE) -o $@ saeclip.c $(LIBS)

build/guard_test build/races_test: $(SOURCE) $(TESTS)
	@mkdir -p build
	$(BUILD) $(MODE) $(TEST) -o $@ tests/test.c $(LIBS)

build/guard_synth: $(SOURCE) tests/synth.c
	@mkdir -p build
	$(BUILD) $(MODE) $(TEST) -DSAECLIP_NO_MAIN -o $@ tests/synth.c saeclip.c $(LIBS)

# RACED: what ThreadSanitizer is to watch; nothing for the whole suite, which takes it some minutes.
RACED = threads
check: build/guard_saeclip build/guard_test build/guard_synth build/races_saeclip build/races_test
	SAECLIP=build/guard_saeclip SYNTH=build/guard_synth build/guard_test
	SAECLIP=build/races_saeclip build/races_test $(RACED)

# One line, to be compared with README.md's.
fingerprint: saeclip tests/synth
	@sh tests/fingerprint.sh

# Every target that there are tools for, or TARGETS="clang-O3 s390x"; takes its time.
portability:
	@FLAGS='$(FLAGS)' sh tests/portability.sh $(TARGETS)

# The program is inside this one, behind a seam; the names below it would shadow its own.
build/guard_faults: $(SOURCE) tests/faults.c tests/check.h
	@mkdir -p build
	$(BUILD) $(GUARD) $(TEST) -Wno-shadow -o $@ tests/faults.c $(LIBS)

# FAULTS: some of its rows, or nothing for all.
FAULTS =
faults: saeclip build/guard_faults
	build/guard_faults $(FAULTS)

# Lines of saeclip.c that the tests and the faults run, as gcov counts them: those that do not run are listed.
# A killed process would leave no counts: training is not killed here, and the seam kills few.
COUNTED = -O0 --coverage
# All but the demo, which takes too long unoptimised.
UNHURRIED = numbers files images model sae stats threads cli look figures atlas fingerprint
GCOV    = gcov
coverage: saeclip tests/synth
	@mkdir -p build/coverage
	@rm -f build/coverage/*
	$(BUILD) $(COUNTED) -o build/coverage/saeclip saeclip.c $(LIBS)
	$(BUILD) $(COUNTED) $(TEST) -o build/coverage/test tests/test.c $(LIBS)
	$(BUILD) $(COUNTED) $(TEST) -Wno-shadow -o build/coverage/faults tests/faults.c $(LIBS)
	SAECLIP=build/coverage/saeclip GCOV_ERROR_FILE=/dev/null build/coverage/test $(UNHURRIED)
	GCOV_ERROR_FILE=/dev/null build/coverage/faults rows
	$(GCOV) -t build/coverage/*.gcda >build/coverage/lines.txt
	@awk -v least=95 -f tests/coverage.awk build/coverage/lines.txt

# Hostile input, one target after the other; see tests/fuzz/fuzz.c and fuzz.sh.
TARGET  = safetensors tensors images lists texts commands checkpoints
SECONDS = 60
FUZZ_CC = clang
FUZZ    = $(EXACT) $(WARN) $(TEST) -Wno-pass-failed -pthread $(GUARD)
FUZZED  = $(SOURCE) tests/fuzz/fuzz.c tests/check.h

build/guard_fuzz: $(FUZZED)
	@mkdir -p build
	$(CC) $(FUZZ) -O0 $(CFLAGS_EXTRA) -o $@ tests/fuzz/fuzz.c $(LIBS)

build/fuzzer: $(FUZZED)
	@mkdir -p build
	@echo 'int LLVMFuzzerTestOneInput(const char *b, long n) { return b && n < 0; }' >build/probe.c
	@$(FUZZ_CC) -fsanitize=fuzzer -o build/probe build/probe.c 2>/dev/null || { echo "make fuzz needs" \
	    "clang and its fuzzer runtime (Debian: clang and libclang-rt-14-dev); none is here"; exit 1; }
	$(FUZZ_CC) $(FUZZ) -fsanitize=fuzzer -DLIBFUZZER $(CFLAGS_EXTRA) -o $@ tests/fuzz/fuzz.c $(LIBS)

fuzz: build/fuzzer build/guard_fuzz
	tests/fuzz/fuzz.sh $(SECONDS) $(TARGET)

fuzz-seeds: build/guard_fuzz
	tests/fuzz/fuzz.sh seeds $(TARGET)

# The peers are passed over where they are not installed (README).
PEERS = ../peers
ROUNDS = 3
build/bench: $(SOURCE) tests/bench/bench.c
	@mkdir -p build
	$(BUILD) $(TEST) -o $@ tests/bench/bench.c $(LIBS)

bench: saeclip build/bench
	build/bench
	@command -v python3 >/dev/null || { echo "the comparison with peers needs python3"; exit 0; }; \
	    python3 tests/bench/compare.py --peers $(PEERS) --rounds $(ROUNDS) && python3 tests/bench/atlas.py

install: saeclip
	$(INSTALL) -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include
	$(INSTALL) saeclip $(DESTDIR)$(PREFIX)/bin
	$(INSTALL) -m 644 saeclip.h $(DESTDIR)$(PREFIX)/include

clean:
	rm -rf saeclip tests/test tests/synth build out

help:
	@echo "make           builds ./saeclip                 (CC=... the compiler, CFLAGS_EXTRA=... more flags)"
	@echo "make demo      the whole method, into out/      (MODEL=FILE IMAGES=DIR: on your own photos)"
	@echo "make report    the report's SAEs, table and figures (MODEL=FILE TRAIN=IMAGES VAL=IMAGES OUT=DIR)"
	@echo "make test      builds and runs the tests        (SAECLIP_DATA=DIR: with the real photos there)"
	@echo "make check     the tests under AddressSanitizer and UndefinedBehaviorSanitizer, then the"
	@echo "               threads under ThreadSanitizer (RACED= all of them)"
	@echo "make fingerprint  a checksum of what saeclip computes: the same everywhere, README.md has it"
	@echo "make portability  the tests and the fingerprint with other compilers, flags and processors"
	@echo "               (TARGETS=\"clang-O3 s390x\": some of them; what has no tools here is named)"
	@echo "make faults    each call that may fail fails in turn, training is killed at random, and no"
	@echo "               file is lost: thousands of runs, some minutes"
	@echo "make coverage  how many lines of saeclip.c these run, and which they do not (gcc and its gcov)"
	@echo "make fuzz      hostile input for every reader, a minute each, under both sanitizers"
	@echo "               (TARGET='images lists' SECONDS=900; needs clang; build/corpus grows from run to"
	@echo "               run, findings are in build/found); make fuzz-seeds runs the seeds alone, once"
	@echo "make bench     how fast it is here, and against its peers (PEERS=DIR of node_modules, ROUNDS=3)"
	@echo "make install   copies saeclip and saeclip.h     (PREFIX=/usr/local DESTDIR=)"
	@echo "make clean     removes what was built"
	@echo "make help      prints this"
