"""Documents are read, and shards are searched, by processes on several nodes of a Ray cluster."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import torch
import httpx
import pytest
import ray

import memory_backends
from emt import MemoryConfig, attach, detach
from emt.cli import main
from emt.cluster.indexing import index_workers
from emt.errors import ConfigError, StoreError
from memory_backends import MemoryBackend
from memory_backends.sharded import ShardMissingError, adopt, shard_of, shards_at
from memory_backends.sharded.remote import connect_remotely
from memory_backends.store.lock import write_lock
from tests.emt.modes.generation import GREEDY
from tests.emt.routing.worlds import asked, document, profile_of
from tests.emt.words import word_tokenizer
from tests.families import build
from tests.memory_backends.sharded.worlds import assert_same, filled, searches, sharded

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models

SHARDS, WORKERS = 4, 2
COUNTED = ("num_messages", "num_bytes")
TEXTS = {f"text {n}": " ".join(f"w{3 + (7 * n + i) % 90}" for i in range(40)) for n in range(7)}


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one CPU on this machine."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        made = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(2):
            made.add_node(**node)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, which workers load."""
    path = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def memory(folder, tmp_path):
    """A memory over an empty sharded store, and its model."""
    model = build("llama")
    config = MemoryConfig(path=str(tmp_path / "store"), memory_type="sharded", num_shards=SHARDS)
    memory = attach(model, config.replace(routing="words"), tokenizer=word_tokenizer())
    memory.backend.save()
    yield memory
    detach(model)


def entries(texts=TEXTS):
    return [(name, text, {"name": name}) for name, text in texts.items()]


def rows_of(memory, name):
    stored = memory.backend.catalog.document(name)
    ids = torch.arange(stored.first_row, stored.first_row + len(stored.row_tokens))
    return [part for pair in memory.backend.fetch_layers(ids).values() for part in pair]


@contextlib.contextmanager
def workers_of(memory, folder):
    with index_workers(str(folder), {}, memory.config, WORKERS, "auto") as workers:
        yield workers
    adopt(memory.config.path)
    memory.refresh()


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
def test_workers_read_what_one_process_reads(memory, folder, tmp_path):
    counted = []
    with workers_of(memory, folder) as workers:
        assert workers.write(entries(), counted.append) == (len(TEXTS), 0, 0)
        assert workers.write(entries()) == (0, 0, len(TEXTS))
        changed = TEXTS | {"text 1": TEXTS["text 2"]}
        assert workers.write(entries(changed)) == (0, 1, len(TEXTS) - 1)
        nodes = {ray.get(each.__ray_call__.remote(_node)) for each in workers.workers}
        workers.write_files(None)
    assert len(nodes) == WORKERS
    assert sorted(memory.documents) == sorted(TEXTS)
    assert sum(counted) == sum(len(text.split()) for text in TEXTS.values())
    model = build("llama")
    other = attach(model, MemoryConfig(path=str(tmp_path / "one")), tokenizer=word_tokenizer())
    for name, text in changed.items():
        other.write(text, document=name)
        for mine, its in zip(rows_of(memory, name), rows_of(other, name), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=2e-3)  # float16, batched
    assert memory.backend.catalog.metadata("text 3") == {"name": "text 3"}
    detach(model)


def _node(_):
    return ray.get_runtime_context().get_node_id()


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_is_started_again_and_nothing_is_doubled(memory, folder):
    with workers_of(memory, folder) as workers:
        workers.write(entries(dict(list(TEXTS.items())[:3])))
        kill(pid_of(workers.workers[0]))
        assert workers.write(entries()) == (len(TEXTS) - 3, 0, 3)
    assert sorted(memory.documents) == sorted(TEXTS)


@pytest.mark.usefixtures("cluster")
def test_documents_that_cannot_be_read_are_named_and_the_others_are_there(memory, folder):
    locked = shard_of("text 0", SHARDS)
    names = [name for name in TEXTS if shard_of(name, SHARDS) == locked]
    lock = write_lock(shards_at(memory.config.path)[locked])
    with workers_of(memory, folder) as workers:
        with (
            lock,
            pytest.raises(StoreError, match=f"{len(names)} documents were not read") as error,
        ):
            workers.write(entries())
        assert all(f"'{name}'" in str(error.value) for name in names)
        adopt(memory.config.path)
        memory.refresh()
        assert sorted(memory.documents) == sorted(set(TEXTS) - set(names))
        assert workers.write(entries()) == (len(names), 0, len(TEXTS) - len(names))
    assert sorted(memory.documents) == sorted(TEXTS)


@pytest.mark.usefixtures("cluster")
def test_emt_index_with_workers(folder, tmp_path, capsys):
    source = tmp_path / "texts"
    source.mkdir()
    for name, text in TEXTS.items():
        (source / f"{name}.txt").write_text(text)
    words = ["index", str(source), "--model", str(folder), "--store", str(tmp_path / "store")]
    (tmp_path / "words.yaml").write_text("passage:\n  routing: words\n")
    words += ["--config", str(tmp_path / "words.yaml"), "--workers", "2", "--ray", "auto"]
    main(words)
    assert f"{len(TEXTS)} documents added" in capsys.readouterr().out
    assert len(shards_at(tmp_path / "store")) == 4


def test_workers_need_shards(folder, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("w3 w4 w5")
    words = ["index", str(tmp_path), "--model", str(folder), "--store", str(tmp_path / "store")]
    main(words)
    with pytest.raises(SystemExit):
        main([*words, "--workers", "2"])
    assert "emt split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--ray", "auto"])
    assert "--workers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("seed", range(20))
def test_whenever_a_worker_is_killed_nothing_is_lost_or_doubled(memory, folder, seed):
    chosen = random.Random(seed)
    texts = {f"{name} {n}": text for name, text in TEXTS.items() for n in range(9)}
    with workers_of(memory, folder) as workers:
        pids = [pid_of(actor) for actor in workers.workers]
        killer = threading.Timer(chosen.uniform(0, 1.5), kill, [chosen.choice(pids)])
        killer.start()
        workers.write(entries(texts))
        killer.join()
        assert workers.write(entries(texts)) == (0, 0, len(texts))
    assert sorted(memory.documents) == sorted(texts)
    assert len(memory) == sum(len(text.split()) for text in texts.values())
    assert memory_backends.verify(memory.config.path) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_whenever_an_actor_is_killed_searches_are_right_or_say_what_is_missing(
    stored, remote, seed
):
    chosen = random.Random(seed)
    pids = [pid_of(actor) for actor in actors_of(remote)]
    killer = threading.Timer(chosen.uniform(0, 0.5), kill, [chosen.choice(pids)])
    killer.start()
    for _ in range(40):
        with contextlib.suppress(ShardMissingError):
            assert_same(stored, remote)
    killer.join()
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(ShardMissingError):
            assert_same(stored, remote)
            break
        assert time.monotonic() < deadline


# -- searching --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A sharded store with rows, opened in this process."""
    backend = filled(sharded(tmp_path_factory.mktemp("stored") / "rows", 2))
    backend.remove_document("d3")
    backend.save()
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def remote(cluster, stored):
    """The same store, with its shards in actors."""
    connect = connect_remotely("auto", 15.0)
    options = {"shard_type": "manual", "missing_shards": "error", "connect": connect}
    backend = MemoryBackend.open(stored.path, "sharded", **options)
    yield backend
    backend.close()


def actors_of(backend):
    return [shard._actor for shard in backend.store.shards]


def test_shards_in_actors_find_what_shards_in_this_process_find(stored, remote):
    assert_same(stored, remote)


def test_a_prompt_s_searches_are_one_message_a_shard_and_so_are_its_rows(remote):
    remote.search_many(searches())  # tells the actors which rows may be found
    shards = list(remote.store.shards)
    messages, num_bytes = ([getattr(each, name) for each in shards] for name in COUNTED)
    hits = remote.search_many(searches())
    found = remote.fetch_layers(torch.arange(10, 40))
    assert [each.num_messages - one for each, one in zip(shards, messages, strict=True)] == [2, 2]
    queries = sum(4 * each.queries.numel() for each in searches())
    rows = sum(4 * part.numel() for pair in found.values() for part in pair)
    answers = sum(16 * hit.scores.numel() for hit in hits)  # float64 and int64
    sent = sum(each.num_bytes - one for each, one in zip(shards, num_bytes, strict=True))
    assert sent == 2 * (queries + answers) + rows + 30 * 8


def test_an_actor_that_died_is_started_again_and_knows_which_rows_may_be_found(stored, remote):
    for actor in actors_of(remote):
        kill(pid_of(actor))
    deadline = time.monotonic() + 60
    while True:  # while they start, a question may fail
        try:
            assert_same(stored, remote)
            break
        except ShardMissingError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.parametrize("name", ["ObjectLostError", "OutOfMemoryError", "NodeDiedError"])
def test_an_answer_that_is_lost_is_a_missing_shard(remote, monkeypatch, name):
    kind = getattr(ray.exceptions, name)
    made = kind("ab" * 14, None, "") if name == "ObjectLostError" else kind("the reason")

    def lose(*_, **__):
        raise made

    monkeypatch.setattr("memory_backends.sharded.remote.ray.get", lose)
    with pytest.raises(ShardMissingError, match=r"shard [01]"):
        remote.search_many(searches())


def test_an_error_in_an_actor_is_told_in_its_own_words(remote, monkeypatch):
    cause = StoreError("a file is damaged.")

    def fail(*_, **__):
        raise ray.exceptions.RayTaskError("ask", "Traceback of a process", cause)

    monkeypatch.setattr("memory_backends.sharded.remote.ray.get", fail)
    with pytest.raises(StoreError, match=r"^a file is damaged\.$"):
        next(iter(remote.store.shards)).samples(0)


def test_a_slow_shard_is_missing(stored, remote):
    slow, _ = remote.store.shards
    slow._time_limit = 1.0
    pid = pid_of(slow._actor)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ShardMissingError, match="no answer within 1"):
            remote.search_many(searches())
    finally:
        os.kill(pid, signal.SIGCONT)
        slow._time_limit = 15.0
    assert_same(stored, remote)


@pytest.mark.usefixtures("cluster")
def test_a_lost_shard_is_an_error_or_is_named(tmp_path):
    filled(sharded(tmp_path / "rows", 2)).save()
    lost = shards_at(tmp_path / "rows")[1]
    lost.rename(lost.with_name("elsewhere"))
    options = {"shard_type": "manual", "connect": connect_remotely("auto", 15.0)}
    with pytest.raises(StoreError, match="shard 1"):
        MemoryBackend.open(tmp_path / "rows", "sharded", **options)
    options["missing_shards"] = "warn"
    backend = MemoryBackend.open(tmp_path / "rows", "sharded", **options)
    with contextlib.closing(backend):
        assert backend.missing_shards == (1,)
        assert all(bool((hits.ids >= 0).any()) for hits in backend.search_many(searches()))


@pytest.mark.usefixtures("cluster")
def test_a_model_answers_from_shards_in_actors(tmp_path):
    model = build("llama")
    options = {
        "path": str(tmp_path),
        "num_shards": 2,
        "remove_special_ids": False,
        "mode": "passage",
    }
    options |= {"passage_rows": 24, "max_passages": 2, "relevance": None, "memory_type": "sharded"}
    config = MemoryConfig.published(**options)
    profile = profile_of(model)
    memory = attach(model, config)
    for number in range(4):
        memory.write(document(number), document=f"{number}")
    memory.keep_profile(profile)
    memory.save()
    expected = [model.generate(asked(n)[None], **GREEDY).tolist() for n in range(4)]
    routed = [memory.route(asked(n)).passages for n in range(4)]
    detach(model)
    memory.close()
    memory = attach(model, config.replace(ray="auto"))
    assert [memory.route(asked(n)).passages for n in range(4)] == routed
    assert [model.generate(asked(n)[None], **GREEDY).tolist() for n in range(4)] == expected
    with pytest.raises(StoreError, match="somewhere else"):
        memory.write(document(9), document="9")
    detach(model)
    memory.close()


@pytest.mark.usefixtures("cluster")
def test_replicas_serve_one_store(memory, folder):
    from ray import serve

    from emt.integrations.ray_serve import app

    for name, text in TEXTS.items():
        memory.write(text, document=name, metadata={"name": name})
    memory.backend.catalog.set_setting("model", str(folder))
    memory.save()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app({"store": memory.config.path, "replicas": "2", "cpus": "0.5"}))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            listed = [client.get("/v1/documents").json() for _ in range(6)]
            assert [len(each["data"]) for each in listed] == [len(TEXTS)] * 6
            body = {"prompt": TEXTS["text 1"][:30], "model": folder.name, "max_tokens": 2}
            answered = client.post("/v1/completions", json=body)
            assert answered.json()["usage"]["completion_tokens"] >= 1
            refused = client.put("/v1/documents/new", json={"text": "w5"})
            assert refused.status_code == 403
        status = serve.status().applications["default"].deployments["emt"]
        assert status.replica_states == {"RUNNING": 2}
    finally:
        serve.shutdown()


@pytest.mark.parametrize(
    "arguments", [{}, {"store": "there", "port": "1"}, {"store": "there", "replicas": "two"}]
)
def test_arguments_of_the_application_are_checked(arguments):
    from emt.integrations.ray_serve import app

    with pytest.raises(ConfigError):
        app(arguments)


def test_token_mode_over_actors_has_to_be_asked_for():
    with pytest.raises(ConfigError, match="every layer"):
        MemoryConfig(ray="auto", mode="token")
    assert MemoryConfig(ray="auto", mode="token", remote_token_mode=True).ray == "auto"
