"""A few questions to the demo model, answered as they come: what `make demo` runs."""

from __future__ import annotations

from octavo import LLM, SamplingParams
from octavo.cli.show import print_summary, print_text

QUESTIONS = [
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Explain in one sentence what a plugin is.",
]


def main() -> None:
    with LLM("demo") as llm:
        for question in QUESTIONS:
            print(f"\n> {question}")
            print_text(
                llm.stream_chat([{"role": "user", "content": question}], SamplingParams(temperature=0, max_tokens=96))
            )
        print_summary(llm)


if __name__ == "__main__":
    main()
