// A streamed answer with openai-js on Node:
//
//     npm ci && node stream.mjs http://127.0.0.1:8000 "Explain nginx in one sentence"

import OpenAI from "openai";

const [url, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/api/v1`, apiKey: "any text" }); // the proxy holds the real key

try {
  const stream = await client.chat.completions.create({
    model: "demo",
    messages: [{ role: "user", content: prompt }],
    stream: true,
  });
  for await (const chunk of stream) {
    process.stdout.write(chunk.choices[0].delta.content ?? "");
  }
  process.stdout.write("\n");
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(`${error.constructor.name} ${error.code}: ${error.message}`); // refused, or broken off in the middle
  process.exitCode = 1;
}
