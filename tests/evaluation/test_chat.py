"""Conversations as test rows: tool calls, thoughts, every assistant turn, prompts next to predictions, plans."""

from __future__ import annotations

import functools
import json
import logging
import tempfile

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_continual import train_stream
from hf_continual.atomic_files import read_json, read_lines
from hf_continual.data.columns import cut_prompts, without_options
from hf_continual.data.rows import load_rows
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.likelihood import answer_nll
from hf_continual.evaluation.match import tool_calls
from hf_continual.evaluation.prompts import prompt_hash, prompt_text
from hf_continual.evaluation.table import build_scorer
from hf_continual.evaluation.trained import conversation_tokens, reference, trained_tokens
from hf_continual.evaluation.turns import assistant_turns
from hf_continual.stream.dry_run import token_counts
from hf_continual.stream.past_rows import with_earlier
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import read_plan
from hf_continual.tasks import Task, TaskStream
from tests import toy
from tests.evaluation.scripted import scripted
from tests.evaluation.templates import tokenizer
from tests.stream import world


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, *arguments):
    properties = {a: {"type": "integer"} for a in arguments}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object", "properties": properties}}}  # fmt: skip


TOOLS = [tool("sum", "a", "b"), tool("neg", "x")]
ROWS = {
    "calls": [
        {"messages": [say("user", "1 + 2 ?"), say("assistant", "", tool_calls=[call("sum", a=1, b=2)])], "tools": TOOLS},
        {"messages": [say("user", "- 4 ?"), say("assistant", None, tool_calls=[call("neg", x=4)])], "tools": TOOLS},
    ],
    "words and call": [
        {"messages": [say("user", "1 + 2 ?"), say("assistant", "let me see", tool_calls=[call("sum", a=1, b=2)])], "tools": TOOLS},
    ],
    "after a call": [
        {"messages": [say("user", "1 + 2 ?"), say("assistant", "", tool_calls=[call("sum", a=1, b=2)]), say("tool", "3", name="sum"), say("assistant", "3 it is")], "tools": TOOLS},
    ],
    "thoughts": [
        {"messages": [say("user", "the sky ?"), say("assistant", "blue", reasoning_content="hm, the sky")]},
        {"messages": [say("user", "the grass ?"), say("assistant", "green", reasoning_content="hm, the grass")]},
    ],
}  # fmt: skip


@functools.cache
def cell(name, kind):
    """Tokenizer, rows as a plan reads them, and the tokens that SFTTrainer makes of them."""
    made, folder = tokenizer(name), tempfile.mkdtemp()
    file = f"{folder}/rows.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        out.write("\n".join(map(json.dumps, ROWS[kind])))
    rows = load_rows(file)
    config = SFTConfig(folder, report_to=[], bf16=False, use_cpu=True, disable_tqdm=True, max_length=None)
    trainer = SFTTrainer(toy.model(), config, train_dataset=rows, processing_class=made)
    return made, rows, [row["input_ids"] for row in trainer.train_dataset]


def whole(row, made):
    prompt, answer = trained_tokens(row, made)
    return prompt + answer


def taught(made, sequences):
    """A model that says these sequences, each token after all before it."""
    return scripted(len(made), made.convert_tokens_to_ids("z"), [(ids, ids) for ids in sequences])


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "gpt-oss"])
def test_what_was_trained_scores_one_and_nothing_else_does(name, kind):
    made, rows, trained = cell(name, kind)
    assert [whole(row, made) for row in rows] == trained
    assert [conversation_tokens(row, made) for row in rows] == trained
    model, ignorant, size = taught(made, trained), taught(made, []), len(rows)
    for scorer in (teacher_forced, generated, functools.partial(generated, match="exact", max_new_tokens=90)):
        assert scorer(model, made, rows).right == [True] * size, kind
        assert scorer(ignorant, made, rows).right == [False] * size
    assert answer_nll(model, made, rows).score.value < 1e-3
    if kind == "calls" and name != "gpt-oss":
        said = generated(model, made, rows, match="tool_calls", max_new_tokens=90)
        assert said.right == [True, True]
        assert [r.reference for r in said.rows] == [
            '{"name": "sum", "arguments": {"a": 1, "b": 2}}', '{"name": "neg", "arguments": {"x": 4}}',
        ]  # fmt: skip
        assert said.rows[0].prediction == '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_another_tool_with_the_same_arguments_is_wrong(name):
    made, rows, _ = cell(name, "calls")
    other = json.loads(json.dumps(ROWS["calls"][0]))
    other["messages"][1]["tool_calls"][0]["function"]["name"] = "neg"
    model = taught(made, [whole(other, made)])
    one = rows.select([0])
    for match in (None, "exact", "stripped", "tool_calls"):
        assert generated(model, made, one, match=match, max_new_tokens=90).right == [False], match
    assert teacher_forced(model, made, one).right == [False]


def test_thoughts_are_not_part_of_the_answer_that_is_compared(caplog):
    """Another thought before the right answer is right; by exact match it is not, and a message says so."""
    made, rows, _ = cell("qwen3", "thoughts")
    other = json.loads(json.dumps(ROWS["thoughts"]))
    for row in other:
        row["messages"][1]["reasoning_content"] = "something else"
    model = taught(made, [whole(row, made) for row in other])
    said = generated(model, made, rows, match="exact", max_new_tokens=60)
    assert said.right == [True, True] and said.rows[0].prediction == "blue" and said.rows[0].reference == "blue"
    assert "come with thoughts" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert teacher_forced(model, made, rows).right == [False, False]
    assert "2 of 2 answers come with thoughts, and exact match requires exactly the same thoughts" in caplog.text
    build_scorer({"generated": {"match": "exact", "max_new_tokens": 512}})  # the advice works


def test_a_template_without_tools_is_refused():
    made = tokenizer("phi4")
    with pytest.raises(ValueError, match="the chat template writes no calls, so there is nothing to score"):
        teacher_forced(taught(made, []), made, ROWS["calls"][:1])


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ('<tool_call>\n{"arguments":{"b":2,"a":1},"name":"sum"}\n</tool_call>', '{"name": "sum", "arguments": {"a": 1, "b": 2}}', 1),
        ('{"name": "sum", "parameters": {"a": 1}}', '{"name": "sum", "arguments": "{\\"a\\": 1}"}', 1),
        ('{"name": "sum", "arguments": {"a": 1}}', '{"name": "sum", "arguments": {"a": 2}}', 0),
        ('{"name": "neg", "arguments": {"a": 1}}', '{"name": "sum", "arguments": {"a": 1}}', 0),
        ('[{"name": "a", "arguments": {}}, {"name": "b"}]', '{"name": "a"}\n{"name": "b"}', 1),
        ('{"name": "b"}\n{"name": "a"}', '{"name": "a"}\n{"name": "b"}', 0),
        ('{"name": "a"', '{"name": "a"}', 0),
        ("three ", "three", 1),
        ('{"name": "a"}', "three", 0),
    ],
)  # fmt: skip
def test_calls_are_compared_as_data(said, wanted, score):
    assert tool_calls(said, wanted) == score


TALK = [say("user", "the sky ?"), say("assistant", "blue"), say("user", "the grass ?"), say("assistant", "green")]


def test_every_assistant_turn():
    """Of two turns one is right, of one turn it is: (0.5 + 1) / 2 by rows, whatever the number of turns."""
    rows = [{"messages": TALK}, {"prompt": TALK[:1], "completion": [say("assistant", "blue")]}]
    turns = assistant_turns(rows[0])
    assert [(t["prompt"], t["completion"]) for t in turns] == [(TALK[:1], TALK[1:2]), (TALK[:3], TALK[3:])]
    assert assistant_turns({"prompt": TALK[:1], "completion": TALK[1:]}) == turns
    # The prompt's tokens were not learned: only the completion's turns count.
    assert len(assistant_turns({"prompt": TALK[:3], "completion": TALK[3:]})) == 1
    shared = [{"from": m["role"], "value": m["content"]} for m in TALK]
    assert len(assistant_turns({"conversations": shared})) == 2
    assert assistant_turns({"prompt": "a", "completion": " b"}) == [{"prompt": "a", "completion": " b"}]
    made = tokenizer("qwen2.5")
    model = taught(made, [whole(turns[0], made)])
    for scorer in (teacher_forced, generated):
        scored = scorer(model, made, rows, turns="all")
        assert [r.score for r in scored.rows] == [0.5, 1.0] and scored.score.value == 0.75 and scored.score.n == 2
        assert [t.score for t in scored.rows[0].turns] == [1.0, 0.0] and scored.protocol.endswith("all assistant turns")
        assert [t.reference for t in scored.rows[0].turns] == ["blue", "green"]
        assert scorer(model, made, rows).right == [False, True], "the last turn alone"
    forced = teacher_forced(model, made, rows, turns="all")
    parts = [t.also["nll"] for t in forced.rows[0].turns]
    assert forced.rows[0].also["nll"] == pytest.approx(sum(parts) / 2)
    assert answer_nll(model, made, rows, turns="all").rows[0].score == pytest.approx(sum(parts) / 2)
    with pytest.raises(ValueError, match="turns='every' must be one of last, all"):
        teacher_forced(model, made, rows, turns="every")
    with pytest.raises(
        ValueError, match=r"row 1: the row has no assistant turn after its first message \(roles: user\)"
    ):
        teacher_forced(model, made, [rows[0], {"messages": TALK[:1]}], turns="all")


def test_the_prompt_to_read():
    assert prompt_text({"prompt": "a b", "completion": " c"}) == "a b"
    assert prompt_text({"messages": TALK}) == "user: the sky ?\nassistant: blue\nuser: the grass ?"
    assert prompt_text({"context": "c", "choices": ["a"], "answer": 0}) == "c" and prompt_text({}) == ""
    called = prompt_text(ROWS["after a call"][0])
    assert called == 'user: 1 + 2 ?\nassistant: {"name": "sum", "arguments": {"a": 1, "b": 2}}\ntool: 3'
    long = prompt_text({"prompt": "a" * 1000 + "b" * 4000})
    assert long == "a" * 500 + " [3,000 characters left out] " + "b" * 1500
    # The hash depends only on the prompt, not on the answer.
    asked = {"messages": [*TALK[:3], say("assistant", "red")]}
    assert prompt_hash({"messages": TALK}) == prompt_hash(asked) == prompt_hash({"prompt": TALK[:3]})


# The toy world's template, with tools: a call is written "w50 NAME VALUE".
TEMPLATE = (
    "{% for t in tools or [] %}w49 {{ t.function.name }} {% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<assistant> {{ m.content }}{% for c in m.tool_calls or [] %} w50 {{ c.function.name }} {{ c.function.arguments.a }}"
    "{% endfor %} <eos> {% else %}<user> {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TOY = [say("user", "w1 w2"), say("assistant", "w3"), say("user", "w4"), say("assistant", "w5 w6")]
CALLED = [say("assistant", "", tool_calls=[call("w51", a="w7")]), say("tool", "w8"), say("assistant", "w9")]


def plan_of(folder, rows, **changes):
    """A plan of two tasks on these rows, with a chat model of a second."""
    made = toy.tokenizer()
    made.chat_template = TEMPLATE
    toy.model().save_pretrained(folder / "model")
    made.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    file = str(folder / "rows.jsonl")
    sft = {**world.SFT, "max_steps": 40, "learning_rate": 1e-2, "save_strategy": "no"}
    return {
        "model": str(folder / "model"), "output_dir": str(folder / "out"), "sft": sft,
        "tasks": [{"name": n, "train": file, "test": file} for n in ("one", "two")],
        "evaluation": {"bootstrap": 0, "metric": {"generated": {"match": "exact", "turns": "all"}}}, **changes,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_a_plan_of_conversations(tmp_path, form):
    """Words, a tool's call and its answer are learned, scored turn by turn, and reported with their prompts."""
    short = [{"type": "function", "function": {"name": "w51"}}]
    talks = [([say("user", "w10 w11")], CALLED), (TOY[:1], TOY[1:])]
    pairs = [{"prompt": p, "completion": c} if form != "messages" else {"messages": p + c} for p, c in talks]
    rows = [{**pairs[0], "tools": short}, {**pairs[1], "tools": None}]
    result = train_stream(plan_of(tmp_path, rows, methods=[{"replay": {"rows": "earlier_tasks", "ratio": 0.3}}]))
    assert result.matrix.base == [0.0, 0.0] and result.matrix.scores[1] == [1.0, 1.0]
    lines = read_lines(tmp_path / "out" / "predictions" / "task-01-two.one.jsonl")
    if form == "messages":
        assert lines[1]["prompt"] == "user: w1 w2\nassistant: w3\nuser: w4"
    else:
        assert lines[1]["prompt"] == "user: w1 w2"
    assert [t["prediction"] for t in lines[1]["turns"]] == ["w3", "w5 w6"] and lines[1]["score"] == 1.0
    assert [t["prediction"] for t in lines[0]["turns"]] == ["w50 w51 w7", "w9"]
    assert [t["reference"] for t in lines[0]["turns"]] == ['{"name": "w51", "arguments": {"a": "w7"}}', "w9"]
    cell = read_json(tmp_path / "out" / "task-01-two" / "continual" / "scores.json")["one"]
    assert cell["n"] == 2 and cell["protocol"] == "exact, greedy, all assistant turns"


def test_conversations_by_from_and_value_are_trained_and_scored(tmp_path):
    shared = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in TOY]}] * 4
    plan = plan_of(tmp_path, shared, evaluation={"bootstrap": 0})
    prepared = prepare(*read_plan(plan))
    assert token_counts(prepared, prepared.stream[0], None) == [12] * 4  # 6 words, 4 roles, 2 ends
    assert train_stream(plan).matrix.scores[1] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": TALK}, {"messages": TALK[:3]}], r"row 2 of the rows to score: .*ends with role 'user'"),
        ([{"messages": TALK}, {"messages": [say("human", "q"), say("gpt", "a")]}], r"row 2 .*use these instead of 'human' and 'gpt'"),
        ([{"prompt": TALK[:1], "completion": TALK[1:]}], r"row 1 of the rows to score: a completion of 3 messages .*turns: all"),
    ],
)  # fmt: skip
def test_rows_without_an_answer_are_met_before_a_model_is_loaded(tmp_path, rows, said):
    plan = plan_of(tmp_path, rows, evaluation={})
    with pytest.raises(PlanError, match=said):
        prepare(*read_plan(plan))
    plan["evaluation"] = {"metric": {"exact_match": {"turns": "all"}}}
    if "human" not in said:
        prepare(*read_plan(plan))


def test_a_tokenizer_without_a_template_is_met_before_a_model_is_loaded(tmp_path):
    plan = plan_of(tmp_path, [{"messages": TALK}], evaluation={})
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(PlanError, match="conversations, but the tokenizer has no chat template"):
        prepare(*read_plan(plan))
    tokenizer("qwen2.5").save_pretrained(tmp_path / "chat")
    plan["model"] = {"path": plan["model"], "tokenizer": str(tmp_path / "chat")}
    prepare(*read_plan(plan))  # the advice works


def test_tools_go_along_with_replayed_rows(tmp_path):
    """A row that is learned again has the tools that it was learned with; tasks without any get none."""
    first, second = Dataset.from_list(ROWS["calls"], on_mixed_types="use_json"), Dataset.from_list([{"messages": TALK}])
    third = Dataset.from_list([{"messages": TALK}])
    stream = TaskStream([Task("a", train=first), Task("b", train=second), Task("c", train=third)])
    asked = {"replay": {"rows": "earlier_tasks", "ratio": 0.3}}
    rows = with_earlier(asked, stream[2], stream, None)["replay"]["rows"]
    assert rows.column_names == ["messages", "tools"]
    assert [row["tools"] and len(row["tools"]) for row in rows] == [2, 2, None]
    assert rows[2]["messages"] == TALK and rows[0]["messages"] == ROWS["calls"][0]["messages"]
    plan = plan_of(tmp_path, ROWS["calls"], memory={"capacity": 1, "policy": "reservoir"})
    kept = prepare(*read_plan(plan)).memory.after["one"]
    assert kept[0]["tools"][0]["function"]["name"] == "sum"
    told = Dataset.from_list([{"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}])
    stream = TaskStream([Task("a", train=told), Task("b", train=second), Task("c", train=third)])
    with pytest.raises(ValueError, match="task 'b' have no chat_template_kwargs, but those of another have"):
        with_earlier(asked, stream[2], stream, None)


@pytest.mark.parametrize("change", [cut_prompts, without_options])
def test_prompts_of_messages_are_not_cut_as_text(change):
    rows = Dataset.from_list([{"prompt": TALK[:1], "completion": TALK[1:2]}])
    with pytest.raises(ValueError, match="shortens text prompts, and these are lists of messages"):
        change(rows, 5, None) if change is cut_prompts else change(rows)


def test_reference_of_parts_and_calls():
    parts = [{"type": "text", "text": "blue"}, {"type": "text", "text": " red"}]
    assert reference({"messages": [say("user", "q"), say("assistant", parts)]}) == "blue red"
    assert reference(ROWS["words and call"][0]) == 'let me see\n{"name": "sum", "arguments": {"a": 1, "b": 2}}'
