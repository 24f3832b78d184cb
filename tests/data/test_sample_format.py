"""Samples that a model writes: the format, reading them back, what is counted, values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import processors

from hf_continual.data.sample_counts import count, merged, survey
from hf_continual.data.sample_format import SampleFormat, documents, format_of, places_of, question_and_answer
from hf_continual.data.sampling import Sampling, sample
from hf_continual.ends import up_to_end
from tests import toy

HOW = SampleFormat(generate=(90, 91), answer=(95,), ends=frozenset({1}), most=12)
ROW = [5, 6, 7, 1], [-100, -100, 7, 1]  # question 5 6, answer 7, end


def test_a_row_as_a_text_to_be_written():
    assert HOW.written(*ROW) == {
        "input_ids": [90, 91, 5, 6, 95, 7, 1],
        "labels": [-100, -100, 5, 6, 95, 7, 1],
    }
    assert HOW.opening == [90, 91]


def test_a_row_without_a_question_has_no_answer_marker():
    assert HOW.written([5, 6, 1], [5, 6, 1]) == {"input_ids": [90, 91, 5, 6, 1], "labels": [-100, -100, 5, 6, 1]}


def test_what_a_template_puts_after_the_answer_is_not_learned():
    assert question_and_answer([5, 6, 7, 1, 9], [-100, -100, 7, 1, -100]) == ([5, 6], [7, 1])
    assert HOW.written([5, 6, 7, 1, 9], [-100, -100, 7, 1, -100]) == HOW.written(*ROW)


def test_the_token_that_begins_a_text_stays_in_front():
    how = SampleFormat((90,), (95,), first=3, ends=frozenset({1}))
    assert how.written([3, 5, 7, 1], [-100, -100, 7, 1]) == {
        "input_ids": [3, 90, 5, 95, 7, 1],
        "labels": [-100, -100, 5, 95, 7, 1],
    }
    assert how.opening == [3, 90]
    assert how.read([5, 95, 7, 1]) == {"input_ids": [3, 5, 7, 1], "labels": [-100, -100, 7, 1]}
    assert how.read([5, 7, 1], questions=False, plain=True) == {"input_ids": [3, 5, 7, 1], "labels": [3, 5, 7, 1]}


def test_rows_without_room_or_without_a_trained_token_are_none():
    assert HOW.written([5] * 9 + [1], [-100] * 8 + [5, 1]) is None  # 2 + 10 + 1 tokens, 12 at most
    assert HOW.written([5] * 8 + [1], [-100] * 7 + [5, 1]) is not None
    assert HOW.written([5, 6], [-100, -100]) is None


def test_what_is_written_is_read_back():
    row = HOW.written(*ROW)
    assert HOW.read(row["input_ids"][2:]) == {"input_ids": ROW[0], "labels": ROW[1]}
    assert HOW.read([*row["input_ids"][2:], 8, 8]) == {"input_ids": ROW[0], "labels": ROW[1]}  # after the end: padding


@pytest.mark.parametrize(
    ("written", "flaw"),
    [
        ([5, 6, 95, 7], "no end"),
        ([5, 6, 7, 1], "no answer"),
        ([5, 95, 6, 95, 7, 1], "several answers"),
        ([95, 7, 1], "empty"),
        ([5, 95, 1], "empty"),
        ([1], "no answer"),
        ([5, 90, 91, 95, 7, 1], "a marker inside"),
    ],
)
def test_what_has_not_the_format(written, flaw):
    assert HOW.read(written) == flaw


def test_texts_without_a_question_have_no_marker():
    assert HOW.read([5, 6, 1], questions=False, plain=True) == {"input_ids": [5, 6, 1], "labels": [5, 6, 1]}
    assert HOW.read([5, 95, 6, 1], questions=False, plain=True) == "a marker inside"
    assert HOW.read([1], questions=False, plain=True) == "empty"
    # Tasks of both kinds: each sample is of one of them.
    assert HOW.read([5, 95, 6, 1], questions=True, plain=True)["labels"] == [-100, 6, 1]
    assert HOW.read([5, 6, 1], questions=True, plain=True)["labels"] == [5, 6, 1]


def test_places():
    assert places_of((1, 2), [1, 2, 1, 1, 2]) == [0, 3]
    assert places_of((1, 2), [1]) == places_of((1,), []) == []


def rows(*pairs):
    return Dataset.from_list([{"input_ids": list(ids), "labels": list(labels)} for ids, labels in pairs])


def test_what_is_counted():
    known = survey(rows(ROW, ([8, 9, 1], [-100, 9, 1])), HOW, "LAMOL").known
    written = [
        HOW.read([5, 6, 95, 7, 1]),  # a row that was learned
        HOW.read([5, 6, 95, 7, 1]),  # the same again
        HOW.read([5, 6, 95, 9, 1]),  # its question with another answer
        HOW.read([8, 8, 95, 9, 1]),  # a question that nobody asked
        HOW.read([8, 8, 95, 9, 1]),  # and again
        HOW.read([8, 8]),
        HOW.read([8, 9, 1]),
        HOW.read([8, 1]),
    ]
    kept, counts = count(written, known)
    assert kept == written[:5]
    assert (counts.written, counts.kept, counts.malformed) == (8, 5, 3)
    assert (counts.duplicated, counts.invented, counts.misanswered) == (2, 2, 1)
    assert counts.flaws == {"no end": 1, "no answer": 2}
    _, unknown = count(written, None)
    assert unknown.invented is unknown.misanswered is None and unknown.duplicated == 2


def test_what_several_tasks_asked():
    one, other = (survey(rows(row), HOW, "LAMOL").known for row in (ROW, ([8, 9, 1], [-100, 9, 1])))
    both = survey(rows(ROW, ([8, 9, 1], [-100, 9, 1])), HOW, "LAMOL").known
    assert all(np.array_equal(a, b) for a, b in zip(merged(one, other), both, strict=True))


def test_a_survey():
    found = survey(rows(ROW, ([5, 6, 1], [5, 6, 1]), ([5] * 11, [5] * 11), ([5], [-100])), HOW, "LAMOL")
    assert (found.rows, found.longest, found.left_out, found.questions, found.plain) == (4, 7, 1, True, True)
    assert len(found.known[0]) == len(found.known[1]) == 2
    assert not len(survey(rows(ROW), HOW, "LAMOL", remember=False).known[0])


def test_packed_rows_are_taken_apart():
    packed = Dataset.from_list(
        [
            {"input_ids": [5, 6, 1, 7, 1], "labels": [-100, 6, 1, 7, 1], "seq_lengths": [3, 2]},
            {"input_ids": [8, 1], "labels": [8, 1], "seq_lengths": [2]},
        ]
    )
    found = [(ids.tolist(), labels.tolist()) for ids, labels in documents(packed)]
    assert found == [([5, 6, 1], [-100, 6, 1]), ([7, 1], [7, 1]), ([8, 1], [8, 1])]


def test_rows_that_cannot_be_learned():
    with pytest.raises(ValueError, match=r"LAMOL: row 1 holds the tokens \[95\] of a marker.*answer_marker"):
        survey(rows(ROW, ([5, 95, 1], [-100, 95, 1])), HOW, "LAMOL")
    with pytest.raises(ValueError, match="several trained parts.*row 1.*Split conversations"):
        survey(rows(ROW, ([5, 6, 7, 1], [5, -100, 7, 1])), HOW, "LAMOL")
    with pytest.raises(ValueError, match="none of the 1 rows has room for the markers within 12 tokens.*max_length"):
        survey(rows(([5] * 20, [5] * 20)), HOW, "LAMOL")


def test_markers_of_a_tokenizer():
    tokenizer, model = toy.tokenizer(), toy.model()
    task = rows(([5, 6, 1], [-100, 6, 1]))
    how = format_of(task, tokenizer, model, "w57 w3", "w58", None, "LAMOL")
    assert (how.generate, how.answer, how.first, how.most) == ((61, 7), (62,), None, 128)
    assert 1 in how.ends and format_of(task, tokenizer, model, "w57", "w58", 40, "LAMOL").most == 40
    with pytest.raises(ValueError, match=r"'__gen__' and '__ans__' become the tokens \[4\] and \[4\].*gen_marker"):
        format_of(task, tokenizer, model, "__gen__", "__ans__", None, "LAMOL")
    tokenizer.add_special_tokens({"unk_token": "w0"})
    with pytest.raises(ValueError, match=r"no tokens for the marker '__gen__' \(it makes \[4\] of it\)"):
        format_of(task, tokenizer, model, "__gen__", "w58", None, "LAMOL")


def test_a_tokenizer_that_begins_its_texts():
    made = toy.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 2)]
    )
    made.add_special_tokens({"bos_token": "<user>"})
    how = format_of(rows(([2, 6, 1], [-100, 6, 1])), made, toy.model(), "w57", "w58", None, "LAMOL")
    assert how.opening == [2, 61]
    assert format_of(rows(([6, 1], [6, 1])), made, toy.model(), "w57", "w58", None, "LAMOL").opening == [61]


def test_the_end_of_a_chat_template_ends_a_sample():
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<assistant>"]})
    how = format_of(rows(([5, 6, 3], [-100, 6, 3])), tokenizer, toy.model(), "w57", "w58", None, "LAMOL")
    assert {1, 3} <= how.ends


def test_samples_are_a_function_of_their_seed():
    model, tokenizer, how = toy.model(), toy.tokenizer(), Sampling(max_new_tokens=10, top_k=0)
    model.train()
    before = torch.get_rng_state()
    one, same, other = (
        sample(model, tokenizer, [61], 4, seed, how, frozenset({1})) for seed in ((0, 1), (0, 1), (0, 2))
    )
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert one == same != other
    assert len(one) == 4 and all(1 <= len(text) <= 10 for text in one)
    assert len(sample(model, tokenizer, [61] * 125, 1, (0,), how, frozenset())[0]) == 3  # 128 positions
    assert up_to_end([5, 1, 6], frozenset({1})) == [5, 1] and up_to_end([5, 6], frozenset({1})) == [5, 6]
