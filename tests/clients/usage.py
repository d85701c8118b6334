"""A streamed answer and what it cost, with openai-python: the chunk with the usage comes last and has no choices.

python usage.py http://127.0.0.1:8000 "Explain nginx in one sentence"
"""

import sys

import openai

url, prompt = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/api/v1", api_key="any text")

stream = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": prompt}],
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")
