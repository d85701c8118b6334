// A streamed answer and what it cost, with openai-js on Node: the chunk with the usage comes last and has no choices.
//
//     npm ci && node usage.mjs http://127.0.0.1:8000 "Explain nginx in one sentence"

import OpenAI from "openai";

const [url, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/api/v1`, apiKey: "any text" });

const stream = await client.chat.completions.create({
  model: "demo",
  messages: [{ role: "user", content: prompt }],
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  if (chunk.usage) {
    process.stdout.write(`\n${chunk.usage.prompt_tokens} + ${chunk.usage.completion_tokens} tokens\n`);
  }
}
