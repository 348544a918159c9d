"""Asks a running server for the text its demo model knows by heart, as a user would: over HTTP, with the openai client.

    python -m wave64.serve.demo.recite http://127.0.0.1:30000

Streams the answer to standard output. Exit status 1 if it is not the text, word for word.
"""

import argparse
import sys
from pathlib import Path

from openai import OpenAI

WORDS = 6  # of the text, given as the prompt


def recite(address: str) -> str:
    """The text as the server at `address` completes it, printed while it arrives. Raises openai's errors."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    prompt = " ".join(known().split()[:WORDS])
    print(f"\n[{model}] {prompt}", end="", flush=True)
    pieces = [prompt]
    for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=1024, temperature=0, stream=True):
        if chunk.choices:
            pieces.append(chunk.choices[0].text)
            print(pieces[-1], end="", flush=True)
    print("\n")
    return "".join(pieces)


def known() -> str:
    return Path(__file__).with_name("gettysburg.txt").read_text(encoding="utf-8").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", help="of the server, such as http://127.0.0.1:30000")
    if recite(parser.parse_args().address).strip() != known():
        sys.exit("this is not the text: the model, an operator or the server is wrong")


if __name__ == "__main__":
    main()
