"""Trains the demo's model on one CPU core: `python tools/needle_lm/train.py --out DIR --minutes 45 --seed 0`.

Writes DIR/{model.safetensors,config.json,generation_config.json,training_log.csv}, and a copy of the model
every `--keep` steps. README.md describes the recipe.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import ANSWER, TEXT, Shape, batch
from model import NeedleLM, Tables, load, save
from torch import Tensor

TEXT_WEIGHT, TEXT_ROWS = (
    0.3,
    0.25,
)  # weight of the ordinary byte loss, and the share of text bytes it is taken on
LOG_EVERY = 25


@dataclass(frozen=True)
class Phase:
    """One step of the curriculum.

    It ends when the running share of exact answers passes `until`, at `steps`, or when the share `clock` of
    the time is spent. Early phases end by accuracy only: the next one builds on what they learn.
    """

    name: str
    shape: Shape
    batch: int
    copies: float = 0.0  # log of the largest virtual number of copies of the text
    until: float = 2.0
    steps: int = 10**9
    clock: float = 1.0


PHASES = (
    Phase("short words", Shape(256, (4, 5), (5, 6), digits=2, letters=(1, 3)), 12, until=0.70, steps=300),
    Phase("words", Shape(256, (3, 4), (4, 4)), 16, until=0.70, steps=300),
    Phase("512", Shape(512, (4, 8), (6, 8)), 8, copies=1.0, until=0.80, steps=300),
    Phase("1024", Shape(1024, (4, 16), (8, 16), near_codes=0.1), 6, copies=3.0, until=0.90, steps=300),
    Phase("2048", Shape(2048, (8, 16), (28, 36), near_codes=0.25), 4, copies=5.0, clock=0.55),
    Phase("many", Shape(2048, (16, 28), (24, 30), near_words=0.08, near_codes=0.25), 4, copies=5.5, clock=0.85),
    Phase("4096", Shape(4096, (24, 64), (40, 56), near_words=0.05, near_codes=0.15), 2, copies=6.0),
)


def orthogonalise(x: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon on a stack of matrices."""
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


class Optimiser:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases."""

    def __init__(self, model: NeedleLM, muon_rate: float, adam_rate: float) -> None:
        inside = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
        others = [p for name, p in model.named_parameters() if name not in inside]
        self.muon_rate, self.adam_rate, self.decay, self.momentum = muon_rate, adam_rate, 0.02, 0.95
        self.by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in inside.values():
            self.by_shape.setdefault(p.shape, []).append(p)
        self.velocity = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.by_shape.items()}
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the rates; gradients are cleared."""
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.param_groups[0]["lr"] = self.adam_rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        rate = self.muon_rate * factor
        for shape, parameters in self.by_shape.items():
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            velocity = self.velocity[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(velocity, self.momentum)) * max(1, shape[0] / shape[1]) ** 0.5
            for p, direction in zip(parameters, update, strict=True):
                p.mul_(1 - rate * self.decay).add_(direction, alpha=-rate)
                p.grad = None


def virtual_copies(rng: np.random.Generator, kind: Tensor, largest: float) -> Tensor | None:
    """Logit bias per key: in 70 % of the sequences attention sees the text up to exp(largest) times.

    Trained at 2,048 tokens, the model then meets the competition of a text a hundred times as long.
    """
    if largest == 0:
        return None
    rows = len(kind)
    bias = torch.from_numpy(rng.random(rows) * largest * (rng.random(rows) < 0.7)).float()
    return torch.where(kind == TEXT, bias[:, None], torch.zeros(()))


def losses(model: NeedleLM, rng: np.random.Generator, phase: Phase, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Answer loss, text loss, and which digits are right: bool [answers, digits], given those before."""
    tokens, kinds = (torch.from_numpy(x) for x in batch(rng, phase.batch, phase.shape))
    inputs, targets, kind = tokens[:, :-1], tokens[:, 1:], kinds[:, 1:]
    states = model(inputs, tables, virtual_copies(rng, kinds[:, :-1], phase.copies))
    answer = kind == ANSWER
    logits, digits = model.lm_head(states[answer]), targets[answer]
    rows = (kind == TEXT) & (torch.rand(kind.shape) < TEXT_ROWS)
    text_loss = F.cross_entropy(model.lm_head(states[rows]), targets[rows])
    right = (logits.argmax(-1) == digits).view(-1, phase.shape.digits)
    return F.cross_entropy(logits, digits), text_loss, right


def train(
    out: Path,
    minutes: float,
    seed: int,
    *,
    init: Path | None,
    first: str,
    muon_rate: float,
    adam_rate: float,
    decay_from: float,
    keep: int,
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = load(init) if init else NeedleLM()
    optimiser = Optimiser(model, muon_rate, adam_rate)
    phases = PHASES[[phase.name for phase in PHASES].index(first) :]
    current, since, step, seen = 0, 0, 0, 0
    tables = Tables(phases[0].shape.length)
    running: np.ndarray | None = None
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (out / "training_log.csv").open("w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(
            [
                "step",
                "phase",
                "seconds",
                "bytes",
                "answer_loss",
                "text_loss",
                "exact",
                "first_digit",
                "last_digit",
            ]
        )
        while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
            phase = phases[current]
            answer_loss, text_loss, right = losses(model, rng, phase, tables)
            (answer_loss + TEXT_WEIGHT * text_loss).backward()
            warm_up = min(1.0, (step + 1) / 20)
            optimiser.step(warm_up * min(1.0, max(0.04, (1 - spent) / (1 - decay_from))))
            step, seen = step + 1, seen + phase.batch * phase.shape.length

            exact, by_place = right.all(1).float().mean().item(), right.float().mean(0).tolist()
            now = np.array([answer_loss.item(), text_loss.item(), exact, by_place[0], by_place[-1]])
            running = now if running is None else running * 0.95 + now * 0.05
            if step % LOG_EVERY == 0:
                row = [
                    step,
                    phase.name,
                    round(spent * 60 * minutes),
                    seen,
                    *(round(float(x), 4) for x in running),
                ]
                log.writerow(row)
                file.flush()
                print(*row, flush=True)
            if step % keep == 0:
                save(model, out / f"step-{step:05d}")
            over = running[2] > phase.until or step - since >= phase.steps or spent > phase.clock
            if over and current + 1 < len(phases):
                current, since = current + 1, step
                running[2] = 0  # the next phase has to earn its end
                tables = Tables(phases[current].shape.length)
    save(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--minutes", type=float, default=45, help="wall time (default 45)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from the weights in this folder")
    parser.add_argument("--first", default=PHASES[0].name, choices=[phase.name for phase in PHASES], help="first phase")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument(
        "--decay-from",
        type=float,
        default=0.5,
        help="share of the time after which the rates fall linearly to 4 %%",
    )
    parser.add_argument("--keep", type=int, default=100, help="steps between kept copies of the model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        args.out,
        args.minutes,
        args.seed,
        init=args.init,
        first=args.first,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        decay_from=args.decay_from,
        keep=args.keep,
    )


if __name__ == "__main__":
    main()
