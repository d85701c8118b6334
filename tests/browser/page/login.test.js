// The door's pure parts: where a browser may be sent after signing out, and a draft where nothing can be kept.

import assert from "node:assert/strict";
import { test } from "node:test";

import { keepDraft, takeDraft, wayOut } from "../../../static/page/login.js";

const ALLOWED = [
  "https://id.example.org/logout?client_id=chat",
  "https://id.example.org:8443/",
  "http://localhost:8080/logout",
  "http://127.0.0.1/logout",
  "http://[::1]:9000/logout",
];

const REFUSED = {
  "no address": [null, undefined, "", 7, {}],
  "no scheme of the web": ["javascript:alert(1)", "data:text/html,hi", "blob:https://a.example/1", "file:///etc/passwd"],
  "open to listeners": ["http://id.example.org/logout", "ws://localhost/"],
  "loopback in the name only": ["http://localhost.example.org/", "http://127.0.0.1.example.org/", "http://a@b.example/"],
  "no address of its own": ["/logout", "//id.example.org/logout", "logout"],
};

test("only https, and this machine, may be gone to after signing out", () => {
  for (const url of ALLOWED) assert.equal(wayOut(url), url);
  for (const [why, urls] of Object.entries(REFUSED)) {
    for (const url of urls) assert.equal(wayOut(url), null, `${why}: ${url}`);
  }
});

test("a browser that keeps nothing loses a draft, and nothing else", () => {
  keepDraft("a question", "alice");
  assert.equal(takeDraft("alice"), "");
});
