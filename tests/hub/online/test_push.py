"""push_to_hub with the unmodified client: every fault ends in success or in one error, and a second call completes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import save_file

from hf_continual import HubPushError, push_to_hub
from hf_continual.hub.facts import CardFacts, Evaluation, TaskFacts
from hf_continual.hub.files import write_card
from hf_continual.hub.refs import ModelRef
from tests.hub.plugin import HUB
from tests.hub.server import READER, TOKEN

FACTS = CardFacts(
    "small", tasks=(TaskFacts("law", train_rows=8), TaskFacts("tax", train_rows=8)),
    evaluation=Evaluation(("law", "tax"), ((0.75, 0.125), (0.5, 0.875)), (0.0, 0.125), "exact match", rows={"law": 8, "tax": 8}),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def folder(tmp_path, made):
    return shutil.copytree(made, tmp_path / "model")


def make(folder, seed=0, facts=FACTS):
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    for i in (1, 2):
        save_file({f"w{i}": torch.randn(64, 64, generator=g)}, folder / f"model-0000{i}-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "training_args.bin").write_bytes(b"pickle of " + TOKEN.encode())
    (folder / "optimizer.pt").write_bytes(b"state")
    if facts is not None:
        write_card(folder, facts)
    return folder


def published(repo_id="me/m"):
    return {n: d for n, (d, _) in HUB.repos[repo_id].head().tree.items() if n != ".gitattributes"}


def complete(folder, repo_id="me/m", resent=False):
    """The repository holds the folder, by one commit."""
    repo = HUB.repos[repo_id]
    assert len(repo.content_commits()) == 1
    there = published(repo_id)
    assert {"README.md", "continual_config.json", "continual_results.json", "plots/forgetting.png"} <= set(there)
    for name, data in there.items():
        assert (folder / name).read_bytes() == data, name
    assert "training_args.bin" not in there and "optimizer.pt" not in there
    assert not any(TOKEN.encode() in data for data in there.values())
    assert len(HUB.uploaded()) == len(set(HUB.uploaded())) + resent, "something was uploaded twice"


def safe_on_disk(folder, before):
    assert {p.name for p in folder.glob("*.safetensors")} == set(before)
    assert all((folder / name).read_bytes() == data for name, data in before.items())


def weights(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_one_commit_and_the_second_call_sends_nothing(hub, folder):
    done = push_to_hub(folder, "me/m", tag="task-2")
    complete(folder)
    assert done.new and done.oid == HUB.repos["me/m"].head().sha == HUB.repos["me/m"].tags["task-2"]
    assert done.commit_url == f"{HUB.url}/me/m/commit/{done.oid}" and set(done.left_out) == {
        "training_args.bin",
        "optimizer.pt",
    }
    assert 'model = AutoModelForCausalLM.from_pretrained("me/m")' in published()["README.md"].decode()
    posts = len(HUB.requests("POST", "/commit/|/preupload/|/batch")) + len(HUB.requests("PUT", ""))
    again = push_to_hub(folder, "me/m", tag="task-2")
    assert not again.new and again.oid == done.oid
    assert posts == len(HUB.requests("POST", "/commit/|/preupload/|/batch")) + len(HUB.requests("PUT", ""))


def test_a_name_without_namespace_is_the_accounts(hub, folder):
    assert push_to_hub(folder, "m").repo_id == "me/m"
    complete(folder)


PASSING = {
    "503 once": dict(status=503),
    "429 with Retry-After": dict(status=429, headers={"Retry-After": "7"}),
    "429 with RateLimit": dict(status=429, headers={"RateLimit": '"api";r=0;t=5'}),
    "429 without": dict(status=429),
    "504 twice": dict(status=504, times=2),
    "a page in place of an answer": dict(kind="html"),
    "answer lost": dict(kind="lost"),
    "connection cut": dict(kind="cut"),
}
CALLS = {
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", "/api/models/me/m$"),
    "write rights": ("GET", "/auth-check/write"),
    "tree": ("GET", "/tree/"),
    "validate": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "put": ("PUT", "/lfs-storage/"),
    "commit": ("POST", "/commit/main"),
    "tag": ("POST", "/tag/"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass(hub, folder, call, fault, caplog):
    caplog.set_level(logging.DEBUG)
    method, path = CALLS[call]
    hub.fault(method, path, **PASSING[fault])
    done = push_to_hub(folder, "me/m", tag="task-2")
    assert done.oid == HUB.repos["me/m"].head().sha == HUB.repos["me/m"].tags["task-2"]
    # The client itself resends a body if its response was lost: no caller can know that it arrived.
    complete(folder, resent=call == "put" and fault == "answer lost")
    assert all(f.times == 0 for f in hub.faults) and TOKEN not in caplog.text
    if call == "commit" and "Retry-After" in fault:
        assert 8.0 in hub.waits
    if call == "commit" and fault == "answer lost":
        assert not done.new and len(hub.requests("POST", "/commit/")) == 1


@pytest.mark.parametrize("call", ["create", "put", "commit"])
def test_told_to_stop_the_same_command_resumes(hub, folder, call, monkeypatch, caplog):
    """In the middle of any call; exit code 75, and no second commit."""
    from hf_continual import cli

    method, path = CALLS[call]
    hub.fault(method, path, kind="none", before=lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["hf-continual", "push", str(folder), "me/m"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 75
    assert "Stopped by SIGTERM. The same command resumes." in caplog.text
    hub.faults.clear()
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    complete(folder)


LASTING = {
    "401": (("GET", "/api/whoami-v2"), dict(status=401), "401.*HF_TOKEN.*hf auth login"),
    "403 create": (
        ("POST", "/api/repos/create"),
        dict(status=403, error="no rights"),
        "403.*account me.*no rights.*create_pr=True",
    ),
    "403 write": (("GET", "/auth-check"), dict(status=403, error="no write role"), "403.*no write role"),
    "403 commit": (("POST", "/commit/"), dict(status=403, error="protected"), "403.*protected"),
    "403 storage": (("PUT", "/lfs-storage/"), dict(status=403), "403"),
    "409 commit": (("POST", "/commit/"), dict(status=409, error="taken"), "409.*taken"),
    "412 for ever": (("POST", "/commit/"), dict(status=412), "412.*somebody else"),
    "413": (("POST", "/commit/"), dict(status=413), "413"),
    "429 for an hour": (
        ("POST", "/commit/"),
        dict(status=429, headers={"Retry-After": "3600"}),
        "429.*3600 s.*not sent again",
    ),
    "429 for ever": (("POST", "/commit/"), dict(status=429), "429.*commits per hour"),
    "503 for ever": (("POST", "/commit/"), dict(status=503), "503.*server error"),
    "cut for ever": (("PUT", "/lfs-storage/"), dict(kind="cut"), "not sent again"),
    "400 secrets": (("POST", "/commit/"), dict(status=400, error="secrets found in files"), "400.*secrets found"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_faults_that_last(hub, folder, fault, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    (method, path), options, says = LASTING[fault]
    before = weights(folder)
    broken = hub.fault(method, path, **{"times": 1000, **options})
    with pytest.raises(HubPushError, match=f"(?s)^me/m was not pushed: .*{says}") as raised:
        push_to_hub(folder, "me/m", tag="task-2", private=False)
    error = raised.value
    assert (error.repo_id, error.folder) == ("me/m", str(folder)) and str(folder) in str(error)
    assert error.resume == f"hf-continual push {folder} me/m --public --tag task-2" and error.resume in str(error)
    safe_on_disk(folder, before)
    assert "me/m" not in HUB.repos or not HUB.repos["me/m"].content_commits()
    broken.times = 0
    push_to_hub(folder, "me/m", tag="task-2", private=False)
    complete(folder)
    written = capfd.readouterr()
    assert TOKEN not in caplog.text + str(error) + repr(error) + written.out + written.err


def test_somebody_commits_meanwhile(hub, folder):
    """412: the head is read again, and the card is written over the current one."""
    HUB.make("me/m")
    theirs = "---\nnew_version: me/next\n---\n# hand\n\nWritten by hand on the Hub.\n"
    hub.fault("POST", "/commit/", times=1, kind="none", before=lambda: HUB.put("me/m", {"README.md": theirs.encode()}))
    push_to_hub(folder, "me/m")
    card = published()["README.md"].decode()
    assert "Written by hand on the Hub." in card and "new_version: me/next" in card
    assert len(HUB.repos["me/m"].content_commits()) == 2  # theirs and ours


def test_a_private_repository_must_be_as_asked(hub, folder):
    push_to_hub(folder, "me/p", private=True)
    assert HUB.repos["me/p"].private
    HUB.make("me/open")
    with pytest.raises(
        HubPushError, match=r"private=True was requested, but the repository already exists and is public"
    ):
        push_to_hub(folder, "me/open", private=True)
    with pytest.raises(HubPushError, match="private=False was requested.*is private"):
        push_to_hub(folder, "me/p", private=False)
    assert not HUB.repos["me/open"].content_commits()


def test_another_account(hub, folder):
    HUB.make("you/m")
    with pytest.raises(HubPushError, match=r"403: the token in HF_TOKEN \(account me\).*create_pr=True"):
        push_to_hub(folder, "you/m")
    with pytest.raises(HubPushError, match=r"403: the token given as an argument \(account reader\)"):
        push_to_hub(folder, "me/new", token=READER)
    with pytest.raises(HubPushError, match="401: the Hub does not accept the token given as an argument"):
        push_to_hub(folder, "me/new", token="hf_" + "x" * 30)
    with pytest.raises(HubPushError, match="the repository does not exist, so no pull request can be opened"):
        push_to_hub(folder, "you/none", create_pr=True)


@pytest.mark.parametrize("fault", [None, dict(kind="lost"), dict(status=503)])
def test_a_pull_request(hub, folder, fault):
    HUB.make("you/m")
    if fault:
        hub.fault("POST", "/commit/", **fault)
    done = push_to_hub(folder, "you/m", create_pr=True)
    repo = HUB.repos["you/m"]
    assert list(repo.pulls) == ["refs/pr/1"] and done.pr_url == f"{HUB.url}/you/m/discussions/1"
    assert repo.head().tree.keys() == {".gitattributes"} and "README.md" in repo.head("refs/pr/1").tree
    assert push_to_hub(folder, "you/m", create_pr=True).new is False and len(repo.pulls) == 1


def test_a_branch(hub, folder):
    push_to_hub(folder, "me/m", revision="stage-2")
    repo = HUB.repos["me/m"]
    assert "README.md" in repo.head("stage-2").tree and "README.md" not in repo.head("main").tree
    with pytest.raises(ValueError, match="create_pr=True opens a pull request against main"):
        push_to_hub(folder, "me/m", revision="stage-2", create_pr=True)


def test_a_tag_that_is_taken(hub, folder):
    push_to_hub(folder, "me/m", tag="v1")
    make(folder, seed=1)
    with pytest.raises(HubPushError, match="the tag 'v1' names commit .* already"):
        push_to_hub(folder, "me/m", tag="v1")


def test_a_dry_run_makes_nothing(hub, folder):
    would = push_to_hub(folder, "me/m", dry_run=True)
    assert would.oid is None and "README.md" in would.files and "me/m" not in HUB.repos
    assert not HUB.requests("PUT", "") and {p for _, p, _ in HUB.requests("POST", "")} == set()


def test_the_authors_text_and_metadata_stay(hub, folder):
    push_to_hub(folder, "me/m")
    card = published()["README.md"].decode()
    edited = card.replace("<!-- hf_continual:keep -->", "<!-- hf_continual:keep -->\nNot for medical use.").replace(
        "library_name:", "widget:\n- text: Hello\nlibrary_name:", 1
    )
    HUB.put("me/m", {"README.md": edited.encode()}, "edited on the Hub")
    make(folder, seed=1)
    push_to_hub(folder, "me/m")
    card = published()["README.md"].decode()
    assert "Not for medical use." in card and "- text: Hello" in card
    local = (folder / "README.md").read_text().replace("Not for medical use.", "Not for legal use.")
    (folder / "README.md").write_text(local)
    push_to_hub(folder, "me/m")
    card = published()["README.md"].decode()
    assert "Not for legal use." in card and "medical" not in card


def test_pictures_and_words_of_the_author_arrive(hub, folder):
    (folder / "figures").mkdir()
    (folder / "figures" / "chart.jpg").write_bytes(b"picture")
    card = (folder / "README.md").read_text().replace("---\n", "---\nlanguage: no\nversion: 1.10\n", 1)
    keep = "<!-- hf_continual:keep -->"
    (folder / "README.md").write_text(card.replace(keep, f"{keep}\n![chart](figures/chart.jpg)"))
    for _ in range(2):
        push_to_hub(folder, "me/m")
        head = published()["README.md"].decode().split("\n---")[0]
        assert "language: 'no'" in head and "\nversion: 1.10" in head
        assert published()["figures/chart.jpg"] == b"picture"
    assert len(HUB.repos["me/m"].content_commits()) == 1


def test_other_weights_in_the_repository_leave_it(hub, folder):
    HUB.put(
        "me/m",
        {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": b"old",
            "training_args.bin": b"pickle",
            "kept.txt": b"x",
        },
    )
    push_to_hub(folder, "me/m")
    assert not {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"} & set(published())
    assert published()["kept.txt"] == b"x"


def test_a_folder_that_is_not_whole(hub, folder):
    shard = folder / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(HubPushError, match="model-00002-of-00002.safetensors has .* it was cut"):
        push_to_hub(folder, "me/m")
    shard.unlink()
    with pytest.raises(HubPushError, match="names model-00002-of-00002.safetensors, which is not in"):
        push_to_hub(folder, "me/m")
    shard.write_bytes(data)
    (folder / "notes.json").write_text(json.dumps({"key": TOKEN}))
    with pytest.raises(HubPushError, match="notes.json contains an access token") as raised:
        push_to_hub(folder, "me/m")
    assert TOKEN not in str(raised.value) and not HUB.log


def test_findings_stop_a_push(hub, folder):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(
        card.replace("<!-- hf_continual:keep -->", "<!-- hf_continual:keep -->\n![x](gone.png)")
    )
    with pytest.raises(HubPushError, match=r"findings, so nothing was sent:\n  \[image\] the image gone.png"):
        push_to_hub(folder, "me/m")
    assert not HUB.repos["me/m"].content_commits()


def test_a_base_that_is_not_there(hub, tmp_path):
    facts = CardFacts("small", base=ModelRef("you/gone"))
    with pytest.raises(HubPushError, match="you/gone is named as a base of this model, but the Hub does not have it"):
        push_to_hub(make(tmp_path / "m", facts=facts), "me/m")


def test_the_licence_comes_from_the_parents(hub, tmp_path):
    HUB.put("you/a", {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT, by you"})
    HUB.put("you/b", {"README.md": b"---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"})
    HUB.put("you/c", {"README.md": b"# nothing\n"})
    base, parent = ModelRef("you/a"), ModelRef("you/b")
    push_to_hub(make(tmp_path / "1", facts=CardFacts("one", base=base)), "me/one")
    card = published("me/one")["README.md"].decode()
    assert (
        "license: mit" in card
        and "mit, the licence of you/a" in card
        and published("me/one")["LICENSE"] == b"MIT, by you"
    )
    mixed = make(tmp_path / "2", facts=CardFacts("two", base=base, parent=parent))
    with pytest.raises(HubPushError, match=r"different licences \(you/a: mit, you/b: mine\).*license='...'"):
        push_to_hub(mixed, "me/two")
    push_to_hub(mixed, "me/two", license="apache-2.0")
    assert "license: apache-2.0" in published("me/two")["README.md"].decode()
    push_to_hub(make(tmp_path / "3", facts=CardFacts("three", base=ModelRef("you/c"))), "me/three")
    card = published("me/three")["README.md"].decode()
    assert "\nlicense:" not in card and "the licence of you/c is not stated" in card


def test_a_folder_of_save_pretrained_and_a_card_by_hand(hub, tmp_path):
    plain = make(tmp_path / "plain", facts=None)
    push_to_hub(plain, "me/plain")
    assert (
        "Not scored" in published("me/plain")["README.md"].decode()
        or "NOT_RUN" in published("me/plain")["README.md"].decode()
    )
    by_hand = make(tmp_path / "hand", facts=None)
    text = "---\nlicense: mit\n---\n\n# Mine\n\nWritten by hand.\n"
    (by_hand / "README.md").write_text(text)
    push_to_hub(by_hand, "me/hand")
    assert published("me/hand")["README.md"].decode() == text and "continual_config.json" not in published("me/hand")


def test_no_token_and_other_ranks(hub, folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert push_to_hub(folder, "me/m") is None and not HUB.log
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubPushError, match="there is no access token"):
        push_to_hub(folder, "me/m")


def test_xet_is_left_to_the_client(hub, folder, monkeypatch):
    """If hf_xet is installed and not switched off, uploads go by Xet; this Hub has none, so it ends in one clear error."""
    from huggingface_hub import constants
    from huggingface_hub.utils._runtime import is_xet_available

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert is_xet_available()
    before = weights(folder)
    with pytest.raises(HubPushError, match="(?s)me/m was not pushed"):
        push_to_hub(folder, "me/m")
    assert (
        HUB.requests("GET", "/xet-write-token/")
        and not HUB.requests("POST", "/batch|/commit/")
        and not HUB.requests("PUT", "")
    )
    safe_on_disk(folder, before)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push_to_hub(folder, "me/m")
    complete(folder)


def test_the_server_is_one(hub, folder, tmp_path):
    """The loopback Hub and the plain client work together without this library."""
    api = HfApi()
    api.create_repo("me/plain")
    api.upload_folder(repo_id="me/plain", folder_path=folder, ignore_patterns=["*.bin"])
    got = snapshot_download("me/plain", local_dir=tmp_path / "got")
    assert (tmp_path / "got" / "config.json").read_bytes() == (folder / "config.json").read_bytes() and got
