// A whole answer with openai-js on Node, from the first model that the proxy offers:
//
//     npm ci && node complete.mjs http://127.0.0.1:8000 "Explain nginx in one sentence"

import OpenAI from "openai";

const [url, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/api/v1`, apiKey: "any text" });

try {
  const models = await client.models.list();
  const answer = await client.chat.completions.create({
    model: models.data[0].id,
    messages: [{ role: "user", content: prompt }],
  });
  console.log(answer.choices[0].message.content);
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(`${error.constructor.name} ${error.code}: ${error.message}`);
  process.exitCode = 1;
}
