# saeclip needs a C11 compiler and POSIX; nothing else, neither to build nor to run.
# CC and CFLAGS_EXTRA may come from the command line or the environment; a cross compiler needs no more:
#     make CC=s390x-linux-gnu-gcc CFLAGS_EXTRA=-static

CFLAGS  = -O3
PREFIX  = /usr/local
INSTALL = install

# Results must not depend on the compiler: no fused or reordered floating-point operations (EXACT), and no
# float that is computed in double, as the usual flags for two processors allow. The compiler is asked which
# processor it compiles for; clang never uses double on s390x and does not know the flag.
EXACT  = -std=c11 -ffp-contract=off -fno-math-errno -fno-trapping-math
MACROS := $(shell $(CC) $(CFLAGS_EXTRA) -dM -E - </dev/null 2>/dev/null)
ifneq ($(filter __i386__,$(MACROS)),)
EXACT += -msse2 -mfpmath=sse
endif
ifneq ($(filter __s390x__,$(MACROS)),)
ifeq ($(filter __clang__,$(MACROS)),)
EXACT += -fexcess-precision=fast
endif
endif

POSIX  = -D_POSIX_C_SOURCE=200809L -D_FILE_OFFSET_BITS=64
WARN   = -Wall -Wextra -Wpedantic -Wshadow -Wvla
BUILD  = $(CC) $(EXACT) $(POSIX) $(WARN) -pthread $(CFLAGS) $(CFLAGS_EXTRA)
LIBS   = -lm
# Tests include saeclip.c and call only some of its static functions.
TEST   = -Wno-unused-function
GUARD  = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
RACES  = -O1 -g -fsanitize=thread
SOURCE = saeclip.c saeclip.h
TESTS  = tests/test.c tests/check.h tests/test_*.c

.PHONY: all demo report test check verify fingerprint portability slurm-test faults fuzz bench install clean help

all: saeclip

saeclip: $(SOURCE)
	$(BUILD) -o $@ saeclip.c $(LIBS)

tests/test: $(SOURCE) $(TESTS)
	$(BUILD) $(TEST) -o $@ tests/test.c $(LIBS)

# Draws images with known answers (see its first comment). -O1 compiles in a quarter of the time.
tests/synth: $(SOURCE) tests/synth.c
	$(BUILD) -O1 $(TEST) -DSAECLIP_NO_MAIN -o $@ tests/synth.c saeclip.c $(LIBS)

# The whole method, into out/: on images that are drawn for it and the small model in weights/, or on your own
# with MODEL=FILE IMAGES=DIR. LATENTS=J,J,... get a sheet each; by default the twelve that best detect what is
# drawn, or that are strongest on the first photo. CLASS=C: masks of the class's mean, not of the first photo.
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

# The published report that saeclip reproduces, five SAEs with its table and figures:
#     make report MODEL=clip.safetensors TRAIN=photos VAL=others OUT=report
# Photos are folders, lists or packed sets; they are resized to SQUARE x SQUARE first. KEEP=1 stores the activations
# (0.6 MB per image for ViT-B/16), which saves ten of twelve passes of the model. REPORTED: a file with the
# report's own table. The last figure shows LATENTS=J,J,... on the images of CLASS in VAL, a number; by default
# the latents that are strongest on the first of them.
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

# RACED: the subjects that run under ThreadSanitizer; empty for all of them, which takes some minutes.
RACED = threads
check: build/guard_saeclip build/guard_test build/guard_synth build/races_saeclip build/races_test
	SAECLIP=build/guard_saeclip SYNTH=build/guard_synth build/guard_test
	SAECLIP=build/races_saeclip build/races_test $(RACED)

# An implementation in PyTorch, right and with two bugs, is compared with saeclip (tests/verify/README.md).
PYTHON = python3
verify: saeclip tests/synth
	@PYTHON="$(PYTHON)" sh tests/verify/verify.sh

# Prints one line, to be compared with the one in README.md.
fingerprint: saeclip tests/synth
	@sh tests/fingerprint.sh

# Every target that the tools for are installed, or TARGETS="clang-O3 s390x". Takes half an hour.
portability:
	@sh tests/portability.sh $(TARGETS)

# The job scripts of tests/slurm on a Slurm of this one machine, which the script starts (as root) and stops.
slurm-test: saeclip tests/synth
	@sh tests/slurm/test.sh

# saeclip.c is compiled into it, with the calls that may fail replaced.
build/guard_faults: $(SOURCE) tests/faults.c tests/check.h
	@mkdir -p build
	$(BUILD) $(GUARD) $(TEST) -Wno-shadow -o $@ tests/faults.c $(LIBS)

# FAULTS: the rows to run; empty for all.
FAULTS =
faults: saeclip build/guard_faults
	build/guard_faults $(FAULTS)

# Hostile input for one target after the other (see tests/fuzz/fuzz.c and fuzz.sh).
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

# SECONDS=0: the seeds alone, once, with any compiler.
fuzz: build/guard_fuzz $(if $(filter 0,$(SECONDS)),,build/fuzzer)
	tests/fuzz/fuzz.sh $(SECONDS) $(TARGET)

# Peers that are not installed are left out (tests/bench/README.md).
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
	@echo "make              builds ./saeclip (CC=COMPILER CFLAGS_EXTRA=FLAGS)"
	@echo "make demo         the whole method, into out/ (MODEL=FILE IMAGES=DIR: yours)"
	@echo "make report       five SAEs, table and figures; days of work, see README.md"
	@echo "                  (MODEL=FILE TRAIN=IMAGES VAL=IMAGES OUT=DIR)"
	@echo "make test         the tests (SAECLIP_DATA=DIR: large files too)"
	@echo "make check        the tests under the sanitizers (RACED= for all threads' tests)"
	@echo "make verify       compares a PyTorch implementation (PYTHON=python3)"
	@echo "make fingerprint  a checksum of all results, to compare with README.md"
	@echo "make portability  other compilers and processors (TARGETS='clang-O3 s390x')"
	@echo "make slurm-test   job arrays for a cluster; needs root and Slurm"
	@echo "make faults       every call that may fail does (FAULTS='train encode')"
	@echo "make fuzz         hostile input, with clang (TARGET='images lists' SECONDS=900;"
	@echo "                  SECONDS=0: the seeds alone, with any compiler)"
	@echo "make bench        speed beside other programs (PEERS=DIR ROUNDS=3)"
	@echo "make install      copies saeclip and saeclip.h (PREFIX=DIR DESTDIR=DIR)"
	@echo "make clean        removes what was built"
