"""How fast PyTorch and Hugging Face's classes are at what ``lmx bench`` measures, on the same machine, right after it.

Run it in an environment with the extra ``parity``: ``python tests/peers/torch_speed.py gpt2 bert t5 generate``. Models
are random; training is eager, float32, with ``torch.optim.AdamW``; a figure is the median of the steps after the first.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

STEPS = 7


def trained(model: Any, batch: Callable[[], dict[str, torch.Tensor]]) -> float:
    """Seconds a training step."""
    optimizer, seconds = torch.optim.AdamW(model.train().parameters(), lr=1e-4), []
    for _ in range(STEPS + 1):
        inputs, start = batch(), time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def tokens(*shape: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, shape)


def gpt2() -> None:
    """GPT-2 124M, 4 rows of 512, without dropout."""

    def batch() -> dict[str, torch.Tensor]:
        rows = tokens(4, 512, vocab=50257)
        return {"input_ids": rows, "labels": rows}

    config = transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    seconds = trained(transformers.GPT2LMHeadModel(config), batch)
    print(f"gpt2: {4 * 512 / seconds:.1f} tokens/s", flush=True)


def bert() -> None:
    """BERT base, 8 rows of 128 of which 15% are predicted."""

    def batch() -> dict[str, torch.Tensor]:
        rows = tokens(8, 128, vocab=30522)
        return {"input_ids": rows, "labels": torch.where(torch.rand(8, 128) < 0.15, rows, -100)}

    for rate in (0.0, 0.1):
        config = transformers.BertConfig(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
        seconds = trained(transformers.BertForMaskedLM(config), batch)
        print(f"bert, dropout {rate}: {seconds:.2f} s a step, {8 * 128 / seconds:.0f} tokens/s", flush=True)


def t5() -> None:
    """T5 small, 8 rows of 128 to 64."""

    def batch() -> dict[str, torch.Tensor]:
        return {"input_ids": tokens(8, 128, vocab=32128), "labels": tokens(8, 64, vocab=32128)}

    for rate in (0.0, 0.1):
        config = transformers.T5Config(dropout_rate=rate, decoder_start_token_id=0)
        seconds = trained(transformers.T5ForConditionalGeneration(config), batch)
        print(f"t5, dropout {rate}: {seconds:.2f} s a step", flush=True)


def generate() -> None:
    """GPT-2 124M, 64 tokens of prompt and 128 new ones, greedy."""
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(dtype)
        for batch in (1, 8):
            prompt, seconds = tokens(batch, 64, vocab=50257), []
            options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}
            for _ in range(4):
                start = time.perf_counter()
                with torch.inference_mode():
                    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                seconds.append(time.perf_counter() - start)
            speed = batch * 128 / statistics.median(seconds[1:])
            print(f"generate, {dtype}, batch {batch}: {speed:.1f} tokens/s", flush=True)


KINDS = {function.__name__: function for function in (gpt2, bert, t5, generate)}

if __name__ == "__main__":
    for name in sys.argv[1:] or KINDS:
        KINDS[name]()
