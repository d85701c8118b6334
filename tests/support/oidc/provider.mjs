// An OpenID provider (oidc-provider with its development interactions) on a free port of 127.0.0.1.
//
//     OIDC_CLIENT='{"client_id": ..., "client_secret": ..., "redirect_uris": [...], ...}' node provider.mjs
//
// Prints `issuer <URL>` and serves until it is terminated. Any login and password will do: login NAME is the account
// with the sub NAME and the e-mail address NAME, or NAME@example.org where there is no @; it is verified, unless the
// name begins with "unverified".

import { generateKeyPairSync, randomBytes } from "node:crypto";
import { createServer } from "node:http";
import { Provider } from "oidc-provider";

const key = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey.export({ format: "jwk" });

function account(id) {
  const email = id.includes("@") ? id : `${id}@example.org`;
  return { accountId: id, claims: () => ({ sub: id, email, email_verified: !id.startsWith("unverified") }) };
}

const server = createServer();
server.listen(0, "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [JSON.parse(process.env.OIDC_CLIENT)],
    claims: { openid: ["sub"], email: ["email", "email_verified"] },
    cookies: { keys: [randomBytes(32).toString("hex")] },
    findAccount: (_, id) => account(id),
    jwks: { keys: [{ ...key, use: "sig" }] },
    pkce: { required: () => true },
  });
  server.on("request", provider.callback());
  console.log(`issuer ${issuer}`);
});
