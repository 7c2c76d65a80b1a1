"""The field's familiar program; only the import says Octavo.

python examples/quickstart.py [MODEL]
"""

from __future__ import annotations

import sys

from octavo import LLM, SamplingParams


def main() -> None:
    prompts = [
        "대한민국의 수도는 어디인가요?",
        "vLLM에 대해서 설명해주세요.",
    ]
    sampling_params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=1024)
    llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else "demo", tensor_parallel_size=1)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")


if __name__ == "__main__":
    main()
