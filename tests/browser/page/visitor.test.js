// The visitor: what follows from each answer of the server, and from signing out.

import assert from "node:assert/strict";
import { test } from "node:test";

import { UNKNOWN, signedOut, staysOut, withAccount, withoutSession } from "../../../static/page/visitor.js";

const account = (mode, user = null, expires_at = null) => ({ session: { mode, user, expires_at }, models: ["m"], limits: [] });
const brief = ({ state, user, owner }) => [state, user, owner];

test("an anonymous visitor is present, and the conversation is that of the mode", () => {
  assert.deepEqual(brief(withAccount(UNKNOWN, account("anonymous"))), ["present", "", "anonymous"]);
});

test("a visitor without a session is new, then present, then without it again", () => {
  const fresh = withAccount(UNKNOWN, account("password"));
  const alice = withAccount(fresh, account("password", "alice", 9));
  const ended = withAccount(alice, account("password"));
  assert.deepEqual([fresh, alice, ended].map(brief), [
    ["new", "", ""], ["present", "alice", "password alice"], ["ended", "alice", "password alice"],
  ]);
  assert.equal(withAccount(ended, account("password")).state, "new", "asked again, no session has just ended");
  assert.equal(withAccount(ended, account("password", "bob", 9)).owner, "password bob");
  assert.equal(withAccount(ended, account("password", null, 9)).user, "alice", "a shared password names no user");
});

test("without an answer of our server, the models stay and the session is gone", () => {
  const before = withAccount(UNKNOWN, account("oidc", "alice", 9));
  assert.deepEqual(withoutSession(before).account, { session: { mode: "oidc", user: null, expires_at: null }, models: ["m"], limits: [] });
  assert.equal(withoutSession(before, "header").account.session.mode, "header");
  assert.equal(withoutSession(UNKNOWN).account.session.mode, "header");
});

test("signed out is neither new nor ended, and only a header signs in again by itself", () => {
  for (const [mode, stays] of [["password", false], ["oidc", false], ["header", true]]) {
    const left = signedOut(withAccount(UNKNOWN, account(mode, "alice", 9)));
    assert.deepEqual([left.state, staysOut(left)], ["left", stays]);
    assert.equal(staysOut(withAccount(left, account(mode, "alice", 9))), false);
  }
});
