#!/usr/bin/env bash
# Run the pack on a machine with a GPU and without network. Every result is in $OUT as soon as it is known.
#
#   bash gpu/run.sh                  in the pack's folder, after each transfer; starts once all pieces have arrived
#   GPU_START=now bash gpu/run.sh    starts with what is there
#
# Seconds, of which no part takes more: GPU_TOTAL (all), GPU_BOX_TESTS, GPU_BOX_SPEED, GPU_BOX_PROOF, GPU_BOX_BIOGRAPHY.
# GPU_PARTS="tests speed proof biography", GPU_PROCESSES (for proof and biography), GPU_SIZE=full|tiny (tiny: a CPU suffices),
# GPU_WORK (kept between transfers), OUT (results), PYTHON.
set -u
pack=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${GPU_WORK:-$HOME/.hf-continual-gpu}
export OUT=${OUT:-$pack/out} GPU_SIZE=${GPU_SIZE:-full} GPU_WORK=$work
python=${PYTHON:-python3}
parts=${GPU_PARTS:-tests speed proof biography}
total=${GPU_TOTAL:-530}
SECONDS=0
mkdir -p "$OUT" "$work"
say() { echo "[$SECONDS s] $*" | tee -a "$OUT/log.txt"; }

"$python" "$pack/gpu/arrive.py" "$work" 2>&1 | tee -a "$OUT/log.txt"
arrived=${PIPESTATUS[0]}
if [ "$arrived" = 3 ] && [ "${GPU_START:-}" != now ]; then
  say "bring the others, or start with what is there: GPU_START=now bash gpu/run.sh"
  exit 0
elif [ "$arrived" != 0 ] && [ "$arrived" != 3 ]; then
  exit "$arrived"
fi

project=$work/project site=$work/site
[ -d "$project" ] || { say "the project has not arrived (project.tar.gz)"; exit 3; }
# Wheels go into a folder of their own, in front of what is installed; again only if they have changed.
if ls "$work"/files/wheels/*.whl > "$work/wheels.now" 2> /dev/null && ! cmp -s "$work/wheels.now" "$work/wheels.installed"; then
  rm -rf "$site"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$work"/files/wheels/*.whl 2>&1 | tee -a "$OUT/log.txt"
  [ "${PIPESTATUS[0]}" = 0 ] || { say "the wheels were not installed"; exit 4; }
  mv "$work/wheels.now" "$work/wheels.installed"
  say "wheels installed"
fi
export PYTHONPATH=$site:$project:$project/recipes/proof/gpu PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_CONTINUAL_CACHE=$work/models
GPU_COMMIT=$(cat "$work/commit")
export GPU_COMMIT
cd "$project" || exit 4

# A part, its seconds, its command. `timeout` ends the whole group of processes.
part() {
  local name=$1 box=$2 left=$((total - SECONDS)) code
  shift 2
  [ "$box" -le "$left" ] || box=$left
  if [ "$box" -lt 5 ]; then
    say "$name: not run, no time is left of $total s"
    return
  fi
  say "$name: at most $box s"
  GPU_SECONDS=$((box - 4)) timeout --signal=TERM --kill-after=3 "$box" "$@" < /dev/null > "$OUT/$name.log" 2>&1
  code=$?
  [ "$code" = 0 ] || tail -n 5 "$OUT/$name.log" | tee -a "$OUT/log.txt"
  case $code in
    0) say "$name: done" ;;
    124 | 137) say "$name: its time is used up, what was done until then is in $OUT" ;;
    *) say "$name: exit code $code" ;;
  esac
  cat "$OUT/$name.log" >> "$work/$name.log"
  rm -f "$OUT/$name.log"  # $OUT is small; the last lines of an error are in log.txt
}

"$python" recipes/proof/gpu/machine.py 2>&1 | tee -a "$OUT/log.txt"
[ "${PIPESTATUS[0]}" = 0 ] || { say "this machine cannot run the project, see above"; exit 5; }
[ "$GPU_SIZE" = tiny ] || part model 60 "$python" recipes/proof/gpu/machine.py --model
for name in $parts; do
  case $name in
    tests)
      chosen=(-m gpu)
      [ "$GPU_SIZE" = tiny ] && chosen=(-m "not gpu" -k "test_bf16_autocast and cpu and equality")
      part tests "${GPU_BOX_TESTS:-120}" "$python" -m pytest -q -W default "${chosen[@]}" tests/gpu  # other versions warn of other things
      ;;
    speed) part speed "${GPU_BOX_SPEED:-150}" "$python" recipes/proof/gpu/speed.py ;;
    proof) part proof "${GPU_BOX_PROOF:-120}" "$python" recipes/proof/gpu/proofs.py longseq ;;
    biography) part biography "${GPU_BOX_BIOGRAPHY:-200}" "$python" recipes/proof/gpu/proofs.py biography ;;
    *) say "GPU_PARTS names $name; there are tests, speed, proof and biography" ;;
  esac
done
say "results: $(cd "$OUT" && ls | tr '\n' ' ')"
