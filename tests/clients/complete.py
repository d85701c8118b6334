"""A whole answer with openai-python, from the first model that the proxy offers.

python complete.py http://127.0.0.1:8000 "Explain nginx in one sentence"
"""

import sys

import openai

url, prompt = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/api/v1", api_key="any text")

try:
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
    print(answer.choices[0].message.content)
except openai.APIError as error:
    sys.exit(f"{type(error).__name__} {error.code}: {error.message}")
