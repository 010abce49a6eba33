"""Torch tensors: by the emulator those of the CPU, and on a GPU its own, on a stream that is not the default one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import longattn as la  # noqa: E402
import tolerances  # noqa: E402
from emu.device import EmulatorDevice  # noqa: E402
from longattn import gpu  # noqa: E402
from longattn._arrays import as_numpy  # noqa: E402
from longattn.reference import dense as reference  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def there(device):
    """Where tensors are, and what calls are told of it."""
    if isinstance(device, EmulatorDevice):
        yield "cpu", device
    elif torch.cuda.is_available():
        with torch.cuda.stream(torch.cuda.Stream()):
            yield "cuda", None
    else:
        pytest.skip("torch has no CUDA")


def arrays(dtype, rows, keys, place, heads=4, kv_heads=2):
    drawn = torch.Generator().manual_seed(7)
    shapes = (1, heads, rows, 64), (1, kv_heads, keys, 64), (1, kv_heads, keys, 64)
    made = [torch.randn(shape, generator=drawn).to(dtype) for shape in shapes]
    return [x.to(place) for x in made], [_numpy(x) for x in made]


def _numpy(x):
    return np.array(as_numpy(x.cpu().contiguous(), "x"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_attention(there, dtype, rows):
    place, device = there
    tensors, numbers = arrays(dtype, rows, 90, place)
    mask = torch.rand(rows, 90, generator=torch.Generator().manual_seed(1)) < 0.6
    for options in ({"causal": True}, {"mask": mask.to(place)}):
        out, lse = gpu.attention(*tensors, return_lse=True, device=device, **options)
        assert out.dtype == dtype and out.device == tensors[0].device
        expected = {name: x if name == "causal" else x.cpu().numpy() for name, x in options.items()}
        out64, lse64 = reference.attention(*numbers, return_lse=True, **expected)
        tolerances.device_attention(*numbers).check(_numpy(out), out64, _numpy(lse), lse64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reads", ["host", "gather"])
def test_steps_over_two_memories(there, dtype, reads):
    """Several under way at once, again and again: whatever the device still works on, results are right."""
    place, device = there
    given = []
    for _ in range(3):
        tensors, numbers = arrays(dtype, 1, 700, place)
        store = la.KVStore(kv_heads=2, head_dim=64, dtype=str(dtype).removeprefix("torch."), capacity=1024)
        cache = gpu.HostKVCache(store, la.index.Flat(store), window=32, reads=reads, device=device)
        cache.append(*tensors[1:])
        given.append((cache, tensors[0], numbers))
    for _ in range(2 if place == "cpu" else 50):
        under_way = [cache.start(q, top_k=700) for cache, q, _ in given]
        for finish, (_, _, numbers) in zip(under_way, given, strict=True):
            tolerances.device_attention(*numbers).check(_numpy(finish()), reference.attention(*numbers))


def test_a_model_whose_keys_lie_in_two_memories(there):
    """A batch, as by transformers' own attention and cache."""
    transformers = pytest.importorskip("transformers", minversion="5.19")
    from longattn.transformers import DeviceConfig, LongAttnCache

    place, device = there
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = transformers.LlamaConfig(
        vocab_size=97, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3, eos_token_id=None, **sizes
    )
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).eval().to(place)
    input_ids = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3)).to(place)
    mask = torch.ones_like(input_ids)
    mask[0, :9] = 0
    how = DeviceConfig(device=device, sinks=2, window=16, top_k=512, index="flat")
    made = {}
    caches = {"eager": transformers.DynamicCache(config=config), "longattn": LongAttnCache(config, device=how)}
    for name, cache in caches.items():
        model.set_attn_implementation(name)
        made[name] = model.generate(
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert torch.equal(made["longattn"].sequences, made["eager"].sequences)
    for ours, theirs in zip(made["longattn"].logits, made["eager"].logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
