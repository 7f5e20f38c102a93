"""A server that is killed while it writes: the store is whole, and is served again."""

import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from emt.serving.limits import Limits
from memory_backends.store.verify import verify
from tests.emt.serving.site import open_site, url

ROOT = Path(__file__).parent.parent.parent.parent
TEXTS = [" ".join(f"w{3 + (7 * n + k) % 90}" for k in range(150 + 40 * n)) for n in range(5)]


def served(folder):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.emt.serving.killed_server", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def write_until_killed(address, key):
    """Write and remove documents; return what was acknowledged, and what was tried last."""
    kept, generator = {}, random.Random(0)
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}) as client:
        while True:
            name, text = f"d{generator.randrange(4)}", generator.choice(TEXTS)
            is_removed = kept.get(name) is not None and generator.random() < 0.3
            try:
                if is_removed:
                    response = client.delete(url(name))
                else:
                    response = client.put(url(name), json={"text": text})
            except httpx.TransportError:
                return kept, name, None if is_removed else text
            assert response.status_code in (200, 201), response.text
            kept[name] = None if is_removed else text


def test_what_was_acknowledged_is_there_and_nothing_half(tmp_path):
    process = served(tmp_path)
    try:
        address, key = process.stdout.readline().split()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            writing = pool.submit(write_until_killed, address, key)
            time.sleep(1.5)
            process.send_signal(signal.SIGKILL)
            kept, last, text = writing.result(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert len(kept) > 1
    assert verify(tmp_path / "store") == []
    with open_site(tmp_path, Limits()) as site:
        for name, expected in kept.items():
            response = site("root", "GET", url(name))
            got = response.json().get("text")
            assert got == expected or (name == last and got == text)
        assert site.put("root", "new", "w3 w4")["status"] == "added"
        assert "new" in site.names("root")
    assert verify(tmp_path / "store") == []
