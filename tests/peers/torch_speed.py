"""How fast PyTorch and Hugging Face's classes are at what ``lmx bench`` measures, on the same machine, right after it.

Run it in an environment with the extra ``parity``: ``python tests/peers/torch_speed.py gpt2 bert t5 generate``, or on a
GPU ``... gpt2_cuda generate_cuda``. Models are random; training is eager, float32, with ``torch.optim.AdamW`` (unless a
line says otherwise); a figure is the median of the steps after the first.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

STEPS = 7


def finished() -> float:
    """The time, when the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trained(model: Any, batch: Callable[[], dict[str, torch.Tensor]], **options: Any) -> float:
    """Seconds a training step; ``options`` are AdamW's."""
    optimizer, seconds = torch.optim.AdamW(model.train().parameters(), lr=1e-4, **options), []
    for _ in range(STEPS + 1):
        inputs, start = batch(), finished()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(finished() - start)
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


def generated(model: Any, batch: int) -> float:
    """Tokens a second, greedy, after 64 tokens of prompt and with 128 new ones."""
    prompt, seconds = tokens(batch, 64, vocab=model.config.vocab_size).to(model.device), []
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}
    for _ in range(4):
        start = finished()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        seconds.append(finished() - start)
    return batch * 128 / statistics.median(seconds[1:])


def generate() -> None:
    """GPT-2 124M."""
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(dtype)
        for batch in (1, 8):
            print(f"generate, {dtype}, batch {batch}: {generated(model, batch):.1f} tokens/s", flush=True)


def gpt2_cuda() -> None:
    """GPT-2 124M on a GPU, rows of 1024, computed in bfloat16, eager and compiled."""
    torch.set_float32_matmul_precision("high")
    config = transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="sdpa")
    for rows in (8, 32):

        def batch(rows: int = rows) -> dict[str, torch.Tensor]:
            inputs = tokens(rows, 1024, vocab=50257).cuda()
            return {"input_ids": inputs, "labels": inputs}

        for compiled in (False, True):
            model = transformers.GPT2LMHeadModel(config).cuda()
            model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
            torch.cuda.reset_peak_memory_stats()
            seconds = trained(torch.compile(model) if compiled else model, batch, fused=True)
            memory = torch.cuda.max_memory_allocated() / 1e9
            how = "compiled" if compiled else "eager"
            print(f"gpt2, {how}, {rows} x 1024: {rows * 1024 / seconds:.0f} tokens/s, {memory:.1f} GB", flush=True)


def generate_cuda() -> None:
    """GPT-2 124M on a GPU in bfloat16."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(torch.bfloat16).cuda()
    for batch in (1, 8, 64):
        print(f"generate, bfloat16, batch {batch}: {generated(model, batch):.0f} tokens/s", flush=True)


KINDS = {function.__name__: function for function in (gpt2, bert, t5, generate, gpt2_cuda, generate_cuda)}

if __name__ == "__main__":
    for name in sys.argv[1:] or ("gpt2", "bert", "t5", "generate"):
        KINDS[name]()
