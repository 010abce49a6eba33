"""What every entry of the registry must hold, and that its pages are current."""

import inspect
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import longattn as la
from longattn import catalogue
from longattn.methods import FAMILY_PACKAGES, Method, collect, methods
from longattn.pictures import changed, digest, png

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"

#: Why methods of `longattn.sparse` and `longattn.vision` have no mask.
ALL_SEEN = {
    "compositional_quasi_attention": "signed weights of all keys",
    "embedding_free_attention": "all cells, which hold all places",
    "forward_cross_attention": "all own tokens and all cross tokens",
    "integrative_feature_cost_attention": "all places",
    "layer_and_channel_spatial_attention": "all layers",
    "match_to_match_additive_attention": "one query and one key of all tokens",
    "mediator_attention": "all mediators, which read all keys",
    "nested_attention": "all keys and all nested ones",
    "parallel_self_cross_attention": "all of both sets",
    "query_shared_cross_attention": "all of both streams",
    "strip_self_attention": "all cells, which hold all places",
}

every_method = pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)


def sections(function):
    return re.findall(r"^(Args|Attributes|Returns|Raises|Cost):$", inspect.getdoc(function), re.MULTILINE)


@every_method
def test_the_function_is_public_and_documented(method):
    assert catalogue.public_path(method.function).startswith("longattn.")
    wanted = {"Args", "Raises"} if inspect.isclass(method.function) else {"Args", "Returns", "Raises", "Cost"}
    assert wanted <= set(sections(method.function))
    documented = inspect.getdoc(method.function)
    for name in inspect.signature(method.function).parameters:
        assert re.search(rf"^    {name}: ", documented, re.MULTILINE), f"{name} is not documented"


@every_method
def test_the_reference_takes_what_the_function_takes(method):
    """In the same order; a function may take further options (`out`, say), and a store in place of its arrays."""
    if method.reference is None:
        assert inspect.isclass(method.function), "only a class may go without a reference"
        return
    assert method.reference.__module__.startswith("longattn.reference.")
    ours, theirs = (inspect.signature(f).parameters for f in (method.function, method.reference))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    by_name = [name for name, p in theirs.items() if p.kind is p.KEYWORD_ONLY]
    assert open_ended or set(by_name) <= set(ours)
    for name in set(by_name) & set(ours):
        assert theirs[name].default == ours[name].default, f"default of {name}"
    positions = [[name for name, p in f.items() if p.kind is p.POSITIONAL_OR_KEYWORD] for f in (ours, theirs)]
    if "store" in ours:
        assert positions[0][0] == positions[1][0]
    else:
        assert positions[0] == positions[1]


@every_method
def test_it_is_tested(method):
    path = ROOT / method.tests
    assert path.is_file() and path.name.startswith("test_")
    text = path.read_text(encoding="utf-8")
    assert method.function.__name__ in text
    assert text.count("\ndef test_") >= len(method.checks)


@every_method
def test_its_identities_and_cost_are_sentences(method):
    for sentence in (*method.checks, method.cost):
        assert sentence[0] in "`" or sentence[0].isupper()
        assert sentence.endswith(".")


@every_method
def test_it_says_when_it_works(method):
    assert {"causal", "non-causal"} & method.modes
    assert {"self", "cross"} & method.modes
    assert method.prefill or method.step
    assert method.dtypes and method.devices
    assert 1980 < method.year < 2100
    assert method.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", method.arxiv)


def test_sorted_by_family_and_name():
    every = la.methods()
    keys = [(method.family, method.name) for method in every]
    assert keys == sorted(keys)
    assert len({method.name for method in every}) == len(every)
    families = {method.family for method in every}
    assert [m for family in sorted(families) for m in la.methods(family)] == list(every)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"family: got 'none', expected .*'exact', .* or '"):
        la.methods("none")


def entry(**change):
    fields = {name: getattr(methods()[0], name) for name in Method.__dataclass_fields__}
    return Method(**fields | change)


def module(name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def test_duplicates_are_refused():
    one, two = module("one", METHOD=entry(name="x")), module("two", METHOD=entry(name="x"))
    assert [method.name for method in collect(iter([one, module("three")]))] == ["x"]
    with pytest.raises(ValueError, match=r"METHOD of two: got name 'x', which one has"):
        collect(iter([one, two]))


def test_what_is_no_entry_is_refused():
    with pytest.raises(TypeError, match=r"METHOD of one: got str, expected a Method"):
        collect(iter([module("one", METHOD="attention")]))
    with pytest.raises(ValueError, match=r"modes of x: got \['diagonal'\], expected some of"):
        entry(name="x", modes=frozenset({"causal", "diagonal"}))
    with pytest.raises(ValueError, match=r"checks of x: got none"):
        entry(name="x", checks=())


def test_the_registry_stays_light():
    """`import longattn` looks through no family package, and looking imports no framework."""
    code = (
        "import sys, longattn\n"
        "from longattn.methods import _registry\n"
        "before = _registry.cache_info().currsize\n"
        "longattn.methods()\n"
        "heavy = ('torch', 'transformers', 'matplotlib', 'longattn.catalogue')\n"
        "print(before, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_every_module_with_an_entry_is_searched():
    """A family package that the registry does not know would hide its methods."""
    package = Path(sys.modules["longattn"].__file__).parent
    with_entry = [path for path in package.rglob("*.py") if re.search(r"^METHOD = ", path.read_text(), re.MULTILINE)]
    names = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in with_entry]
    assert len(names) == len(methods())
    assert [name for name in names if not name.startswith(FAMILY_PACKAGES)] == []


def test_the_pages_are_current():
    """If this fails: longattn methods --docs docs/methods."""
    expected = catalogue.pages()
    assert {path.name for path in PAGES.iterdir()} == {*expected, catalogue.MASKS}
    stale = [name for name, text in expected.items() if (PAGES / name).read_text(encoding="utf-8") != text]
    assert stale == []


def test_the_pictures_are_current():
    """If this fails: longattn methods --docs docs/methods."""
    pictures = {path.stem: path.read_bytes() for path in (PAGES / catalogue.MASKS).iterdir()}
    expected = {name: digest(mask) for name, mask in catalogue.masks().items()}
    assert set(pictures) == set(expected)
    assert [name for name, picture in pictures.items() if expected[name].encode() not in picture] == []
    assert sum(map(len, pictures.values())) < 1 << 20


@pytest.mark.parametrize("method", [m for m in methods() if m.mask is not None], ids=lambda method: method.name)
def test_masks_are_those_of_every_instruction_set(method, isa):
    mask = method.mask()
    assert mask.ndim == 2 and mask.dtype == bool and 0 < mask.mean() < 1
    assert digest(mask) == digest(catalogue.masks()[method.name])


def test_sparse_and_vision_methods_have_masks_unless_all_is_seen():
    of_both = [m for m in methods() if m.function.__module__.startswith(("longattn.sparse.", "longattn.vision."))]
    assert {method.name for method in of_both if method.mask is None} == set(ALL_SEEN)


def test_masks_have_the_shape_of_their_method():
    masks = catalogue.masks()
    assert (masks["channel_group_attention"] == np.kron(np.eye(4), np.ones((16, 16)))).all()
    reach = np.abs(np.subtract.outer(np.arange(12), np.arange(12))) <= 3
    assert (masks["focal_modulation"] == np.kron(reach, reach)).all()
    near = np.abs(np.subtract.outer(np.arange(12) // 3, np.arange(4))) <= 1
    assert (masks["super_token_attention"] == np.kron(near, near)).all()
    regions = (
        masks["distributed_progressive_attention"].reshape(3, 4, 3, 4, 3, 4, 3, 4).transpose(0, 2, 1, 3, 4, 6, 5, 7)
    )
    assert (regions.reshape(9, 16, 9, 16).all(axis=(1, 3)).sum(axis=1) == 1).all()
    assert (masks["distributed_progressive_attention"].sum(axis=1) == 16).all()


def test_what_changes_with_a_token_depends_on_it():
    assert (changed(lambda x: np.cumsum(x, axis=0), 9) == np.tri(9)).all()
    assert (changed(lambda x: x[::2, :1], 6, channels=2) == np.eye(6)[::2]).all()
    # The order of a token's numbers, whatever is added to all of them.
    assert (changed(lambda x: np.argsort(x, axis=1), 6) == np.eye(6)).all()


def test_pages_say_what_rows_and_columns_are():
    page = PAGES_OF_METHODS["attention_guided_crop.md"]
    assert "which of 64 patches (from left to right) 24 crops (from top to bottom) see" in page
    for method in methods():
        if method.shown is not None:
            assert method.mask is not None
            assert f"\n\nExample, {method.shown}: which of " in PAGES_OF_METHODS[f"{method.name}.md"]
    parts = {"local_attention_mamba", "native_sparse_attention", "hierarchical_global_local_attention"}
    assert {method.name for method in methods() if method.shown} >= parts | {"criss_cross_attention"}


def test_a_picture_is_its_mask():
    mask = np.random.default_rng(0).random((50, 90)) < 0.3
    data = png(mask)
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    pixels = np.unpackbits(rows[:, 1:], axis=1)[:, :width].reshape(50, height // 50, 90, width // 90)
    assert (pixels == mask[:, None, :, None]).all()
    assert zlib.crc32(data[start : start + 4 + length]) == int.from_bytes(data[start + 4 + length : start + 8 + length])


PAGES_OF_METHODS = catalogue.pages()


@pytest.mark.parametrize("name", sorted(PAGES_OF_METHODS))
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", PAGES_OF_METHODS[name])
    assert [t for t in targets if "://" not in t and not (PAGES / t).exists()] == []
