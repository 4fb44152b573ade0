import inspect
import re
import textwrap
import time
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dmd_core.types import PairBatch
from pipelines import pairs
from pipelines.config import PairsSection
from pipelines.pairs import (
    PairSchemaError,
    decode_negative_prompts,
    decode_pairs,
    encode_pairs,
    fingerprint_of,
    pair_facts,
)
from tests.pipelines.made_pairs import FINGERPRINT, SHAPE, made_batch, made_table, negative_prompt


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(found, expected):
    assert (found.pair_ids, found.prompts) == (expected.pair_ids, expected.prompts)
    for name in ("noise", "latents"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(bits(one), bits(other))


def with_nulls(table, name):
    """`table` with every value of one column missing."""
    index = table.schema.get_field_index(name)
    field = table.schema.field(index)
    return table.set_column(index, field, pa.nulls(len(table), field.type))


def part(batch, span):
    return PairBatch(*(getattr(batch, field.name)[span] for field in fields(PairBatch)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_round_trip_is_bit_exact_also_for_slices_chunks_and_special_values(dtype, tmp_path):
    batch = made_batch(range(10), dtype)
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 6e-8, 65504.0]
    batch.noise.view(-1)[: len(special)] = torch.tensor(special)
    nan_with_payload = 0x7E01 if dtype == torch.float16 else 0x7FC00001
    bits(batch.latents).view(-1)[0] = nan_with_payload
    table = encode_pairs(batch, range(10), fingerprint=FINGERPRINT, provenance={})
    assert_same(decode_pairs(table), batch)
    assert_same(decode_pairs(table.slice(3, 4)), part(batch, slice(3, 7)))
    chunked = pa.concat_tables([table.slice(7), table.slice(0, 0), table.slice(2, 3)])
    shuffled = [7, 8, 9, 2, 3, 4]
    expected = PairBatch(
        tuple(batch.pair_ids[i] for i in shuffled),
        tuple(batch.prompts[i] for i in shuffled),
        batch.noise[shuffled],
        batch.latents[shuffled],
    )
    assert_same(decode_pairs(chunked), expected)
    pq.write_table(chunked, tmp_path / "pairs.parquet", row_group_size=4)
    assert_same(decode_pairs(pq.read_table(tmp_path / "pairs.parquet")), expected)
    assert len(decode_pairs(table.slice(0, 0))) == 0


def assert_facts_are_those_of(table):
    facts, pairs_ = pair_facts(table), decode_pairs(table)
    assert facts.pair_ids.dtype == np.int64
    assert facts.pair_ids.tolist() == list(pairs_.pair_ids)
    for found, tensor in ((facts.noise, pairs_.noise), (facts.latents, pairs_.latents)):
        assert found.dtype == "<f2" and found.shape == (len(table), tensor[:1].numel() or 24)
        assert found.tobytes() == tensor.numpy().tobytes()
    return facts


def test_facts_are_the_numbers_of_the_pairs_also_of_slices_and_chunks():
    table = made_table(range(10))
    whole = assert_facts_are_those_of(table)
    for array, name in ((whole.noise, "noise"), (whole.latents, "latent")):
        (chunk,) = table[name].chunks
        assert array.ctypes.data == chunk.buffers()[1].address  # a view: nothing is copied
    assert_facts_are_those_of(table.slice(3, 4))
    assert_facts_are_those_of(table.slice(0, 0))
    assert_facts_are_those_of(pa.concat_tables([table.slice(7), table.slice(0, 0), table[2:5]]))
    with pytest.raises(PairSchemaError, match="pair_id: int64"):
        pair_facts(table.drop_columns(["seed"]))
    with pytest.raises(PairSchemaError, match="'latent' has 3 empty"):
        pair_facts(with_nulls(table.slice(0, 3), "latent"))


def test_facts_of_many_rows_make_no_python_value_for_each():
    many = pa.concat_tables([made_table(range(1000))] * 300).combine_chunks()

    def seconds(call):
        started = time.process_time()
        call()
        return time.process_time() - started

    assert len(pair_facts(many).latents) == 300_000
    facts = min(seconds(lambda: pair_facts(many)) for _ in range(3))
    assert facts < 0.3 * min(seconds(many["pair_id"].to_pylist) for _ in range(3))


def test_a_negative_prompt_may_be_missing_and_nothing_else(tmp_path):
    table = made_table(range(9))
    pq.write_table(table, tmp_path / "pairs.parquet")
    read = pq.read_table(tmp_path / "pairs.parquet")
    assert decode_negative_prompts(read) == [negative_prompt(i) for i in range(9)]
    assert {None, "not 4"} <= set(decode_negative_prompts(read))
    none = encode_pairs(made_batch([1, 2]), [1, 2], fingerprint=FINGERPRINT, provenance={})
    assert decode_negative_prompts(none) == [None, None] and len(decode_pairs(none)) == 2
    for name in table.column_names:
        if name != "negative_prompt":
            with pytest.raises(PairSchemaError):
                decode_pairs(with_nulls(table, name))


def test_the_reader_in_the_docstring_reads_the_pairs(tmp_path, monkeypatch, capsys):
    text = inspect.cleandoc(pairs.__doc__ or "").split("without this project:")[1]
    snippet = textwrap.dedent(text).strip()
    lines = snippet.splitlines()
    assert len(lines) <= 6 and "pipelines" not in snippet
    batch = made_batch(range(6))
    pq.write_table(made_table(range(6)), tmp_path / "pairs.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    arrays = {}
    names["print"] = lambda name, _: arrays.update({name: names["array"].reshape(-1, *SHAPE)})
    exec(snippet, names)
    assert np.array_equal(arrays["noise"], batch.noise.numpy())
    assert np.array_equal(arrays["latent"], batch.latents.numpy())


def test_other_tables_are_refused_with_both_schemas():
    table = made_table(range(3))
    wrong_type = table.set_column(1, "pair_id", table["pair_id"].cast(pa.int32()))
    about = {"shape": "[24]", "dtype": "float16"}
    wrong_width = table.set_column(
        5, pa.field("noise", pa.binary(4), metadata=about), pa.array([b"1234"] * 3, pa.binary(4))
    )
    metadata = dict(table.schema.metadata)
    decode_pairs(table)  # what was found of one schema is not taken for another
    for damaged, found in (
        (wrong_type, "pair_id: int32"),
        (wrong_width, r"fixed_size_binary\[4\]"),
        (table.drop_columns(["seed"]), "pair_id: int64"),
        (table.drop_columns(["negative_prompt"]), "pair_id: int64"),  # the rows of version 1
        (table.replace_schema_metadata({}), "pair_id: int64"),
        (
            table.replace_schema_metadata({**metadata, b"dmd.fingerprint_digest": b"0"}),
            "fingerprint_digest: '0'",
        ),
    ):
        with pytest.raises(PairSchemaError, match=rf"(?s)found:.*{found}.*expected:.*noise"):
            decode_pairs(damaged)


def test_rows_of_another_schema_version_or_with_gaps_are_refused():
    table = made_table(range(3))
    newer = table.set_column(0, table.schema.field(0), pa.array([3] * 3, pa.int16()))
    with pytest.raises(PairSchemaError, match=r"version \[3\]; expected 2"):
        decode_pairs(newer)
    gaps = table.set_column(2, table.schema.field(2), pa.array(["a", None, "b"]))
    with pytest.raises(PairSchemaError, match="'prompt' has 1 empty"):
        decode_pairs(gaps)


def test_tensors_of_different_kinds_are_not_encoded():
    batch = made_batch(range(2))
    for wrong in (batch.latents.float(), batch.latents[:, :1]):
        with pytest.raises(PairSchemaError, match="expected one shape and one dtype"):
            encode_pairs(
                replace(batch, latents=wrong), [0, 1], fingerprint=FINGERPRINT, provenance={}
            )


def test_each_setting_that_changes_the_pairs_changes_the_fingerprint():
    section = PairsSection()
    base = fingerprint_of(section, "a" * 64)
    changes = {
        "solver": "ddim",
        "steps": 49,
        "guidance_scale": 7.25,
        "negative_prompt": "blurry",
        "height": 64,
        "width": 64,
        "dtype": "float32",
        "compute_dtype": "bfloat16",
        "seed": 1,
    }
    digests = {
        fingerprint_of(section.model_copy(update={key: value}), "a" * 64).digest
        for key, value in changes.items()
    }
    digests |= {base.digest, fingerprint_of(section, "b" * 64).digest}
    digests.add(replace(base, numerics_version=2).digest)
    assert len(digests) == len(changes) + 3
    assert re.fullmatch(r"generations/[0-9a-f]{16}", base.folder)


def test_pairs_of_bfloat16_text_encoders_are_a_generation_of_their_own():
    section = PairsSection()
    exact, mixed = (
        fingerprint_of(section.model_copy(update={"compute_dtype": name}), "a" * 64)
        for name in ("float32", "bfloat16")
    )
    assert (exact.numerics_version, mixed.numerics_version) == (1, 2)
    before = replace(mixed, numerics_version=1)  # its text encoders were in float32
    assert before.folder != mixed.folder


def test_where_and_how_fast_the_pairs_are_made_does_not_change_the_fingerprint():
    section = PairsSection()
    other = section.model_copy(
        update={"prompts": "b.txt", "root": "c", "actors": 4, "batch_size": 8, "rows_per_block": 8}
    )
    assert fingerprint_of(section, "a") == fingerprint_of(other, "a")


def test_provenance_is_recorded_and_no_part_of_the_identity():
    one, other = (
        encode_pairs(made_batch([1]), [1], fingerprint=FINGERPRINT, provenance={"torch": version})
        for version in ("1", "2")
    )
    assert b"dmd.provenance" in one.schema.metadata
    key = b"dmd.fingerprint_digest"
    assert one.schema.metadata[key] == other.schema.metadata[key]
    assert {"torch", "ray", "pyarrow"} <= pairs.library_versions().keys()
