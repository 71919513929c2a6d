#!/usr/bin/env bash
# Builds the wheel, installs it into an environment of its own, and does there what README and
# docs/your_data.md say: outside of the repository, with nothing of it on the path. About ten
# minutes on two cores. `make test-wheel` runs it.
#
#   tests/wheel.sh [PYTHON]     an interpreter; packages that it has are used, others are installed
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:-python3}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH PYTHONHOME
export CUDA_VISIBLE_DEVICES= LONGFACTORY_CACHE="$place/cache" HF_HUB_OFFLINE=1
step() { echo; echo "--- $(date +%T) $*"; }

step "the wheel"
git -C "$repository" archive HEAD | (mkdir "$place/source" && tar -x -C "$place/source")
"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$place/dist" "$place/source"
rm -rf "$place/source"
wheel=$(ls "$place"/dist/longfactory-*.whl)
"$python" -m zipfile -l "$wheel" | grep -c share/ | sed 's/$/ files of examples and data/'

step "installed"
"$python" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --no-deps "$wheel"
# The dependencies, which take long to install, are those of the interpreter that was given: through
# a .pth file, which comes after the environment's own packages.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > "$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
mkdir "$place/home" && cd "$place/home"
longfactory() { "$place/venv/bin/longfactory" "$@"; }
"$place/venv/bin/python" -c "
import longfactory, sys
assert longfactory.__file__.startswith('$place/venv'), longfactory.__file__
print(longfactory.__file__)"
longfactory version
longfactory --help > /dev/null
longfactory schema > schema.json
longfactory completion bash > completion.sh && bash -n completion.sh
if longfactory --help | grep -q webui; then longfactory webui --help > /dev/null; fi

step "init, dry run, plan, train, chat: the demo data"
longfactory init sft
longfactory train sft.yaml --dry_run use_cpu=true > /dev/null
longfactory plan sft.yaml --gpus 8xH100 > plan.txt && tail -n 4 plan.txt
longfactory train sft.yaml use_cpu=true max_steps=2 max_samples=20 cutoff_len=512 num_train_epochs=1 \
  gradient_accumulation_steps=1 2>&1 | tail -n 5
test -f outputs/sft/model.safetensors && test -f outputs/sft/training_loss.png
echo "What is a list?" | longfactory chat model_name_or_path=outputs/sft max_new_tokens=8

step "a newcomer's own file: 30 conversations, one of them long"
"$place/venv/bin/python" - <<'PY'
import json
rows = [
    {"conversations": [{"from": "human", "value": f"What is {i} plus {i}?"}, {"from": "gpt", "value": str(2 * i)}]}
    for i in range(30)
]
document = " ".join(f"Line {i}: the number of this line is {i * 7 % 1000}." for i in range(300))
rows[17]["conversations"][0]["value"] = document + " Which number is in line 41?"
rows[17]["conversations"][1]["value"] = "287"
open("chats.jsonl", "w").write("\n".join(json.dumps(row) for row in rows))
PY
longfactory init sft --data chats.jsonl --lora --out chats.yaml
longfactory train chats.yaml use_cpu=true num_train_epochs=1 2>&1 | tee chats.log | tail -n 5
grep -q "30 samples\|27 samples" chats.log && ! grep -q "longer than cutoff_len" chats.log
test -f outputs/chats/adapter_model.safetensors
$(grep -o 'longfactory chat .*' chats.log) max_new_tokens=4 <<< "What is 3 plus 3?"

step "the page"
"$place/venv/bin/longfactory" webui --port 0 > page.txt & page=$!
until grep -q "The page:" page.txt; do sleep 0.2; kill -0 $page; done
"$place/venv/bin/python" - "$(grep -o 'http://[^ ]*' page.txt)" <<'PY'
import json, sys, urllib.request
url = sys.argv[1]
for path in ("/", "/static/app.js", "/static/board.js", "/static/charts.js", "/static/style.css"):
    assert urllib.request.urlopen(url + path).status == 200, path
found = json.load(urllib.request.urlopen(url + "/api/recipes"))["recipes"]
assert any(recipe["name"] == "quickstart.yaml" for recipe in found), found
PY
kill $page && wait $page
longfactory webui --export board.html && grep -q outputs/sft board.html

if [ "${QUICKSTART:-1}" = 1 ]; then
  step "quickstart"
  longfactory init examples
  "$place/venv/bin/python" examples/quickstart.py 2>&1 | tail -n 60
fi
step "done"
