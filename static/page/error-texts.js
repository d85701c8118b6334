// @ts-check
/**
 * What to do about an error: the server's codes, and those of chat/client.js, in words for the reader.
 *
 * Pure. A code that is not here is shown with the server's own message, so a new server works with an old page.
 */

/**
 * @typedef {object} Advice
 * @property {string} title what happened
 * @property {string} text what to do
 * @property {boolean} retry whether the same message may succeed later
 */

/** @type {(title: string, text: string) => Advice} */
const again = (title, text) => ({ title, text, retry: true });
/** @type {(title: string, text: string) => Advice} */
const otherwise = (title, text) => ({ title, text, retry: false });

const PAGE_FAULT =
  "This is a fault of the page, not of your message. Reload it; if it comes back, report it to the operator of this server.";
const CUT = "Retry to ask for it again."; // that a part is here, its mark says

/** @type {Record<string, Advice>} */
export const ADVICE = {
  // 400: the request
  invalid_json: otherwise("The server could not read the request", PAGE_FAULT),
  invalid_request: otherwise("The server did not accept the request", PAGE_FAULT),
  field_not_allowed: otherwise("The request has a field that this server does not allow", PAGE_FAULT),
  model_not_allowed: again("This model is not offered here", "Choose another model above, then retry."),
  too_many_messages: otherwise("This conversation has too many messages", "Start a new conversation to go on."),
  input_too_long: otherwise(
    "This is more text than the server accepts",
    "Send a shorter message. If the conversation itself has grown long, start a new one.",
  ),
  upstream_rejected: again(
    "The model refused this request",
    "Put it differently or make it shorter. A new conversation helps when this one has grown too long for the model.",
  ),
  context_length_exceeded: otherwise(
    "The conversation has grown too long for this model",
    "Start a new conversation to go on.",
  ),
  // 401, 403: sessions and logins
  session_required: again("Your session is not valid any more", "Reload the page to get a new one, then ask again."),
  session_expired: again("Your session has expired", "Reload the page to begin a new one, then ask again."),
  login_required: otherwise("You need to sign in first", "Sign in, then ask again."),
  invalid_credentials: otherwise("This name or password is not right", "Check them and try again."),
  cross_origin: otherwise(
    "The server does not know this page's address",
    "Open the page under its public address. " +
      "If you run this server: set server.public_url, or add this address to server.extra_origins.",
  ),
  not_allowed: otherwise("You may not use this chat", "Ask the operator of this server for access."),
  // 404 to 431: the way there
  not_found: otherwise(
    "The server has no chat at this address",
    "Reload the page. If it comes back, report it to the operator of this server.",
  ),
  method_not_allowed: otherwise("The server did not accept this kind of request", PAGE_FAULT),
  request_timeout: again("Your message took too long to reach the server", "Check your connection, then retry."),
  length_required: otherwise("The server could not tell how long the request is", PAGE_FAULT),
  body_too_large: otherwise(
    "This is more than the server accepts",
    "Send a shorter message, or start a new conversation.",
  ),
  unsupported_media_type: otherwise("The server did not accept the form of the request", PAGE_FAULT),
  headers_too_large: otherwise(
    "The request's headers are too large",
    "Clear this site's cookies in your browser, then reload the page.",
  ),
  // 429: how much
  rate_limited: again(
    "That was too many requests in a short time",
    "Wait for the countdown, then retry. Nothing is lost.",
  ),
  too_many_tries: again("That was too many tries", "Wait for the countdown, then try again."), // the page's own code
  too_many_streams: again(
    "Too many answers are being written at once",
    "Stop one in another tab or wait for it to end, then retry.",
  ),
  tokens_exhausted: again(
    "The allowance of tokens is used up",
    "It comes back by itself: the limits below the message box say when.",
  ),
  too_many_sessions: again(
    "Too many new sessions from your network",
    "Wait for the countdown, then retry. Open tabs go on working.",
  ),
  upstream_rate_limited: again(
    "The model is busy with other people's requests",
    "This is not your own limit. Wait for the countdown, then retry.",
  ),
  // 500 to 504: the server, and the model behind it
  internal_error: again(
    "Something broke inside the server",
    "Retry. If it comes back, report it to the operator of this server, with the request number below.",
  ),
  upstream_auth: otherwise(
    "The model does not accept the server's key",
    "Only the operator of this server can repair that: please report it.",
  ),
  upstream_error: again("The model had a fault of its own", "Retry in a moment."),
  upstream_unreachable: again(
    "The server cannot reach the model",
    "Retry in a minute. If it goes on, report it to the operator of this server.",
  ),
  upstream_protocol: again("The model's reply made no sense", "Retry. If it goes on, report it to the operator of this server."),
  upstream_timeout: again("The model took too long to answer", "Retry, or ask for something shorter."),
  busy: again("The server is full at the moment", "Wait for the countdown, then retry."),
  draining: again("The server is restarting", "Retry in a few seconds. A part that is already here stays here."),
  limits_unavailable: again(
    "The server cannot count requests at the moment",
    "It refuses all questions until it can. Retry in a moment.",
  ),
  // in the middle of an answer
  stream_interrupted: again("The answer was interrupted", CUT),
  stream_timeout: again("The model fell silent in the middle of the answer", CUT),
  stream_too_long: again(
    "The answer took longer than this server allows",
    "Ask for the rest, or for something shorter.",
  ),
  stream_error: again("The model broke off with an error", CUT),
  // found by this page
  truncated: again("The answer broke off before its end", CUT),
  connection_lost: again("The connection broke before the answer ended", "Check your connection. " + CUT),
  network_error: again("The server could not be reached", "Check your connection, then retry."),
  client_timeout: again("Nothing arrived for too long", "Check your connection, then retry."),
  bad_event: again("The answer arrived damaged", CUT),
  protocol_error: again(
    "The reply did not come from the chat server",
    "Something between you and it may have answered instead (a Wi-Fi login page?). Reload the page.",
  ),
};

/**
 * @param {{code: string, message: string, status?: number}} error
 * @returns {Advice}
 */
export function adviceFor({ code, message, status = 0 }) {
  if (Object.hasOwn(ADVICE, code)) return ADVICE[code];
  const retry = status === 0 || status === 200 || status === 429 || status >= 500;
  return { title: "The server sent an error", text: message || `Its code is ${code}.`, retry };
}
