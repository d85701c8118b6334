"""A streamed answer with openai-python, in the loop that most guides show.

python stream.py http://127.0.0.1:8000 "Explain nginx in one sentence"
"""

import sys

import openai

url, prompt = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/api/v1", api_key="any text")  # the proxy holds the real key

try:
    stream = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": prompt}], stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()
except openai.APIError as error:  # refused, or broken off in the middle
    sys.exit(f"{type(error).__name__} {error.code}: {error.message}")
