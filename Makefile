# Each target is one script; the scripts and the continuous integration run the same commands.
.PHONY: demo test test-all check fix bench clean

demo:
	@scripts/demo.sh

test:
	@scripts/test.sh

test-all:
	@scripts/test.sh --all

check:
	@scripts/check.sh

fix:
	@scripts/fix.sh

bench:
	@scripts/bench.sh

clean:
	@scripts/clean.sh
