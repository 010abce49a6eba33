"""Questions about a long text to a transformers model whose KV cache lives in host memory.

    python examples/generate_transformers.py --context 32768 --questions 4 --top-k 64

The model is the small one that comes with longattn, the text Python's own standard library with facts
hidden in it. The text is read once; every question then continues from it and is cropped away again.
Needs torch and transformers: pip install 'longattn[transformers]'.
"""

from __future__ import annotations

import argparse
import time

import torch

from longattn.demo.runner import MODEL
from longattn.demo.text import CODE_DIGITS, haystack
from longattn.transformers import LongAttnCache, RetrievalConfig
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384, help="tokens (bytes) of text")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=64, help="keys selected per KV head; 0 reads all keys")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="longattn").eval()
    retrieval = RetrievalConfig(top_k=arguments.top_k, window=64) if arguments.top_k else None
    cache = LongAttnCache(model.config, dtype="bfloat16", capacity=arguments.context + 64, retrieval=retrieval)

    hay = haystack(arguments.context, arguments.questions, clear_head=64, clear_tail=1024)
    text = torch.from_numpy(hay.tokens)[None]
    start = time.perf_counter()
    with torch.inference_mode():
        for chunk in text.split(2048, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
    print(f"read {text.shape[1]} tokens in {time.perf_counter() - start:.1f} s")

    for needle in hay.needles:
        prompt = torch.cat([text, torch.from_numpy(needle.question)[None]], dim=1)
        start = time.perf_counter()
        output = model.generate(prompt, past_key_values=cache, max_new_tokens=CODE_DIGITS, do_sample=False)
        seconds = time.perf_counter() - start
        answer = bytes(output[0, prompt.shape[1] :].clamp(max=255).tolist()).decode(errors="replace")
        verdict = "right" if answer == needle.code.decode() else f"wrong, it is {needle.code.decode()}"
        print(f"code for {needle.word.decode():12s} {answer}  {verdict}  ({seconds * 1e3:.0f} ms)")
        cache.crop(text.shape[1] - cache.get_seq_length())
    print(cache.stats())


if __name__ == "__main__":
    main()
