#!/usr/bin/env bash
# Everything that can be checked and measured on a GPU, in one go and without a network.
#
#   bench/gpu.sh --wheels [DIR] [--python 3.12 …]   beforehand, with a network: fetch what that machine lacks
#   bench/gpu.sh [options of bench.gpu]             there: less than nine minutes
#   bench/gpu.sh --simulated                        anywhere: a little of everything, on the CPU
#
# PYTHON names the interpreter that has torch (python3). WHEELS is the folder of wheels (build/wheels), which git
# ignores: take it along by hand. What is missing there goes into build/gpu-venv; the interpreter's own packages
# are left as they are. Without the wheels it goes on with what there is.
set -u
cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
	PYTHON=python3
	if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
WHEELS=${WHEELS:-build/wheels}

if [ "${1:-}" = --wheels ]; then
	shift
	case ${1:-} in '' | -*) ;; *) WHEELS=$1 && shift ;; esac
	exec "$PYTHON" -m bench.wheels "$WHEELS" "$@"
fi

if [ -f "$WHEELS/roots.txt" ]; then
	venv=build/gpu-venv
	rm -rf "$venv"
	quiet="--quiet --disable-pip-version-check --no-index --no-compile"
	if "$PYTHON" -m venv --without-pip --system-site-packages "$venv"; then
		# Where PYTHON is of an environment itself, its packages are not the system's: they are added by path.
		"$PYTHON" -c 'import sys, site; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
			>"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
		PYTHON=$PWD/$venv/bin/python
		into=
	else
		export PYTHONPATH=$PWD/build/gpu-site${PYTHONPATH:+:$PYTHONPATH}
		rm -rf build/gpu-site
		into="--target build/gpu-site"
	fi
	# shellcheck disable=SC2086
	if ! "$PYTHON" -m pip install $quiet $into --find-links "$WHEELS" --requirement "$WHEELS/roots.txt"; then
		echo "not all packages can be installed; one by one:"
		while read -r root; do
			"$PYTHON" -m pip install $quiet $into --find-links "$WHEELS" "$root" || echo "MISSING: $root"
		done <"$WHEELS/roots.txt"
	fi
else
	echo "no wheels in $WHEELS: going on with what $PYTHON has"
fi
export PYTHONUNBUFFERED=1
exec "$PYTHON" -m bench.gpu --spent-s "$SECONDS" "$@" # with what the wheels took
