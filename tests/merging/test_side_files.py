"""The files next to the weights: tokenizer, chat template, processor and generation configuration belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.tokenizer_files import extent, vocabulary
from hf_continual.merging.methods.interpolate import interpolate
from hf_continual.merging.methods.linear import merge_linear
from tests import toy
from tests.merging.world import adapter, build, tuned

WORDS = len(toy.VOCABULARY)
SAID = "{{ messages[0]['content'] }} w9"
LAYERS = {"num_hidden_layers": 1}


def tokens(
    folder: Path, template: str | dict | None = None, more: tuple = (), eos: str = "<eos>", inside: bool = False
):
    """Save a tokenizer."""
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(folder, save_jinja_files=not inside)


@pytest.fixture
def base(tmp_path):
    model = build(**LAYERS)
    model.save_pretrained(tmp_path / "base")
    tokens(tmp_path / "base")
    return model


def another(base, folder, seed=1, eos=None):
    model = tuned(base, seed)
    if eos is not None:
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=eos)
    model.save_pretrained(folder)
    return folder


def noted(result, *words):
    return any(all(w in note for w in words) for note in result.report["notes"])


def ends(folder):
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("template", [SAID, {"default": SAID, "tool_use": "{{ tools }}"}])
@pytest.mark.parametrize("order", [("chat", "plain"), ("plain", "chat")])
def test_the_only_chat_template_is_kept_with_its_tokenizer_and_its_end(base, tmp_path, order, template, inside):
    tokens(another(base, tmp_path / "chat", 1, eos=[1, 13]), template, eos="w9", inside=inside)
    tokens(another(base, tmp_path / "plain", 2))
    result = merge_linear([tmp_path / n for n in order], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template and tokenizer.eos_token == "w9"
    assert ends(tmp_path / "out") == [1, 13]
    assert noted(result, "chat template is that of chat", "plain has none")
    assert noted(result, "stop at different tokens", "chat at [1, 13]", "generation configuration is chat's")


def test_of_two_templates_the_newest_models_is_taken_with_all_that_belongs_to_it(base, tmp_path):
    tokens(another(base, tmp_path / "old", 1, eos=[1, 13]), {"default": SAID, "rag": "{{ documents }}"}, eos="w9")
    tokens(another(base, tmp_path / "new", 2, eos=[1, 12]), "{{ messages }}", eos="w8")
    result = merge_linear([tmp_path / "old", tmp_path / "new"], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.eos_token, ends(tmp_path / "out")) == ("{{ messages }}", "w8", [1, 12])
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    assert noted(result, "chat template is that of new", "differ")


def test_equal_side_files_need_no_words(base, tmp_path):
    for seed, name in enumerate("ab"):
        tokens(another(base, tmp_path / name, seed), SAID)
    assert merge_linear([tmp_path / "a", tmp_path / "b"], tmp_path / "out").report["notes"] == []


def test_a_chat_model_that_says_its_end_only_in_config_json_stops_after_a_merge(base, tmp_path):
    tokens(another(base, tmp_path / "chat"), SAID, eos="w9")
    (tmp_path / "chat" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    (tmp_path / "chat" / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 13]}))
    result = interpolate(tmp_path / "base", tmp_path / "chat", tmp_path / "out", alpha=0.5)
    assert ends(tmp_path / "out") == [1, 13] and noted(result, "chat has no generation_config.json", "[1, 13]")
    (tmp_path / "base" / "generation_config.json").unlink()
    interpolate(tmp_path / "base", tmp_path / "chat", tmp_path / "again", alpha=0.5)
    assert ends(tmp_path / "again") == [1, 13]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.bos_token_id == 1


def test_an_adapter_that_was_taught_another_end_stops_there_in_a_model(base, tmp_path):
    tokens(adapter(base, tmp_path / "a", 1), SAID, eos="w9")
    result = interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=1.0, output="model")
    assert ends(tmp_path / "out") == [1, 13] and noted(result, "[1, 13]", "eos_token of a's tokenizer")
    # The adapter folder's own values count.
    GenerationConfig(eos_token_id=[13]).save_pretrained(tmp_path / "a")
    interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "own", alpha=1.0, output="model")
    assert (tmp_path / "own/generation_config.json").read_bytes() == (
        tmp_path / "a/generation_config.json"
    ).read_bytes()
    result = merge_linear([tmp_path / "a"], tmp_path / "adapter", base=tmp_path / "base")
    assert result.kind == "adapter" and not (tmp_path / "adapter/generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token == "w9"


@pytest.mark.parametrize(
    "kept",
    [
        ("tokenizer_config.json",),
        ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
        ("tokenizer.json",),
        ("chat_template.jinja",),
        ("added_tokens.json",),
    ],
)
def test_part_of_a_tokenizer_beside_an_adapter_does_not_hide_the_base_s(base, tmp_path, kept):
    tokens(tmp_path / "whole", SAID)
    folder = adapter(base, tmp_path / "a", 1)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "whole" / name).write_text("{}")
    for name in kept:
        shutil.copy(tmp_path / "whole" / name, folder)
    for kind in ("model", "adapter"):
        merge_linear([folder], tmp_path / kind, base=tmp_path / "base", output=kind)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (WORDS, "<eos>", "<pad>")
        assert tokenizer.chat_template == (SAID if "chat_template.jinja" in kept else None)


@pytest.mark.parametrize("more", [(), ("[PAD]",)])
def test_an_end_that_an_adapter_s_unused_tokenizer_names_is_kept(base, tmp_path, more):
    tokens(adapter(base, tmp_path / "a", 1), SAID, more, eos="w9")
    if not more:
        (tmp_path / "a" / "tokenizer.json").unlink()
    interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=1.0, output="model")
    assert ends(tmp_path / "out") == [1, 13] and len(AutoTokenizer.from_pretrained(tmp_path / "out")) == WORDS


def test_a_template_inside_a_part_of_a_tokenizer_goes_with_the_adapter(base, tmp_path):
    folder = adapter(base, tmp_path / "a", 1)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": SAID}))
    interpolate(tmp_path / "base", folder, tmp_path / "out", alpha=1.0, output="model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == SAID and len(tokenizer) == WORDS


def test_a_full_model_without_a_tokenizer_gets_an_older_ones(base, tmp_path):
    another(base, tmp_path / "new")
    (tmp_path / "new" / "tokenizer_config.json").write_text("{}")
    result = merge_linear([tmp_path / "base", tmp_path / "new"], tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == WORDS
    assert noted(result, "tokenizer is that of base")


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@pytest.mark.parametrize("own", [(), PROCESSORS[:1], PROCESSORS[1:2], PROCESSORS[1:]])
def test_what_the_base_has_of_a_processor_and_the_adapter_lacks_is_kept(base, tmp_path, own):
    folder = adapter(base, tmp_path / "a", 1)
    tokens(folder)
    for place, names in ((tmp_path / "base", PROCESSORS), (folder, own)):
        for name in names:
            (place / name).write_text(json.dumps({"of": place.name}))
    result = interpolate(tmp_path / "base", folder, tmp_path / "out", alpha=1.0, output="model")
    for name in PROCESSORS:
        assert json.loads((tmp_path / "out" / name).read_text()) == {"of": "a" if name in own else "base"}
    assert noted(result, "base's", "preprocessor") == bool(own)


def test_old_and_new_forms_of_a_processor_do_not_contradict_each_other(base, tmp_path):
    nested = {"processor_class": "P", "image_processor": {"size": 1}, "video_processor": {"size": 1}}
    flat = {"size": 2}
    new, old = another(base, tmp_path / "new", 1), another(base, tmp_path / "old", 2)
    (new / "processor_config.json").write_text(json.dumps(nested))
    (old / "preprocessor_config.json").write_text(json.dumps(flat))
    merge_linear([old, new], tmp_path / "nested")
    assert json.loads((tmp_path / "nested/processor_config.json").read_text()) == nested
    assert not (tmp_path / "nested/preprocessor_config.json").exists()
    merge_linear([new, old], tmp_path / "flat")
    assert json.loads((tmp_path / "flat/preprocessor_config.json").read_text()) == flat
    kept = json.loads((tmp_path / "flat/processor_config.json").read_text())
    assert kept == {"processor_class": "P", "video_processor": {"size": 1}}


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("resized", [False, True])
def test_an_extended_vocabulary_has_the_longest_tokenizer(tmp_path, order, resized):
    for name, more in (("a", ("<tool>", "</tool>")), ("b", ())):
        rows = (WORDS + 2 if more else WORDS) if resized else WORDS + 8
        build(seed=len(more), vocab_size=rows, **LAYERS).save_pretrained(tmp_path / name)
        tokens(tmp_path / name, SAID if name == "b" else None, more)
    result = merge_linear([tmp_path / n for n in order], tmp_path / "out", vocab="extend")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == WORDS + 2 and tokenizer.convert_tokens_to_ids("</tool>") == WORDS + 1
    assert tokenizer.chat_template == SAID
    assert noted(result, f"tokenizer is that of a ({WORDS + 2} tokens)") and noted(result, "template is that of b")


def test_tokens_without_a_row_are_not_taken_where_another_tokenizer_fits(base, tmp_path):
    folder = adapter(base, tmp_path / "a", 1)
    tokens(folder, SAID, ("[PAD]",))
    result = merge_linear([folder], tmp_path / "out", base=tmp_path / "base", output="model")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == WORDS
    assert noted(result, f"tokenizer of a has {WORDS + 1} tokens", f"{WORDS} rows", "not taken")
    tokens(tmp_path / "base", None, ("[PAD]",))
    result = merge_linear([folder], tmp_path / "none", base=tmp_path / "base", output="model")
    assert noted(result, f"{WORDS + 1} tokens", f"{WORDS} rows", "no other fits")


def test_code_of_a_tokenizer_goes_with_it(base, tmp_path):
    new = another(base, tmp_path / "new")
    tokens(new)
    config = json.loads((new / "tokenizer_config.json").read_text())
    auto = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    (new / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": auto}))
    (new / "tokenization_own.py").write_text("class Own: ...\n")
    merge_linear([tmp_path / "base", new], tmp_path / "out")
    assert (tmp_path / "out/tokenization_own.py").is_file()


def test_vocabularies_of_slow_tokenizers(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    (tmp_path / "added_tokens.json").write_text('{"<new>": 3}')
    assert vocabulary(tmp_path) == {0: "[PAD]", 1: "[UNK]", 2: "a", 3: "<new>"} and extent(tmp_path) == (4, 3)
    (tmp_path / "vocab.txt").unlink()
    assert extent(tmp_path) == (None, None)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert extent(tmp_path) == (3, 3)


def test_a_damaged_side_file_is_named(base, tmp_path):
    tokens(another(base, tmp_path / "a"))
    (tmp_path / "a" / "generation_config.json").write_text("{")
    with pytest.raises(MergeError, match=r"a/generation_config.json is not JSON"):
        merge_linear([tmp_path / "base", tmp_path / "a"], tmp_path / "out")
