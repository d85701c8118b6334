"""A streamed answer with openai-python and asyncio.

python stream_async.py http://127.0.0.1:8000 "Explain nginx in one sentence"
"""

import asyncio
import sys

import openai


async def main(url: str, prompt: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/api/v1", api_key="any text") as client:
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": prompt}], stream=True
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                print(chunk.choices[0].delta.content, end="", flush=True)
        print()


try:
    asyncio.run(main(*sys.argv[1:]))
except openai.APIError as error:
    sys.exit(f"{type(error).__name__} {error.code}: {error.message}")
