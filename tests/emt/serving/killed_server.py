"""Serves a store until it is killed; prints where. `test_killed` runs it."""

import sys
from pathlib import Path

from tests.emt.serving.site import open_site
from tests.emt.serving.tiny_server import serving

if __name__ == "__main__":
    with open_site(Path(sys.argv[1]), stride=16, max_length=32) as site, serving(site.app) as url:
        sys.stdout.write(f"{url} {site.keys['root']}\n")
        sys.stdout.flush()
        sys.stdin.read()
