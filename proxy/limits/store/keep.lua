-- Renews, settles or adds what a holder has in its counters.
-- KEYS: the holder's mark, then the counters. ARGV: the holder's id, how long it holds (ms), what to do, then for each
-- counter: kind, reserved amount, used amount, window (ms).
-- `renew` holds for another period, also in a store that has lost its content, and stores what is used by now.
-- `settle` ends the hold and charges what was used, once: its answer may be lost and the call repeated. The mark lasts an
-- hour: in a longer outage the few answers that were being settled at its beginning are charged twice; marks of a day
-- would take as much memory as all else. `settle` never begins a window: an ended window no longer counts.
-- `add` does, since it charges what was used while the store was unavailable. Events of moving windows count from now on.
local id, hold, what = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if what == 'renew' then
    if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
elseif not redis.call('SET', KEYS[1], 1, 'NX', 'PX', 3600000) then
    return 1
end
for n = 2, #KEYS do
    local key, at = KEYS[n], 4 + (n - 2) * 4
    local kind, amount, used, window = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    read(kind, key, window, 0)
    if kind == 'moving' then
        for event = 1, used do redis.call('ZADD', key, now, id .. ':' .. event) end
        redis.call('PEXPIRE', key, window)
    elseif kind == 'held' and what == 'renew' then
        hold_lease(key, id, hold)
    elseif kind == 'held' then
        redis.call('ZREM', key, id)
    elseif what == 'renew' then
        undo_expiry(key, id)
        hold_tokens(key, id, amount, used, hold, window)
    else
        undo_expiry(key, id)
        redis.call('HDEL', key, id)
        local ended = redis.call('ZREM', key .. ':h', id .. ':' .. amount)
        if ended == 1 then redis.call('HINCRBY', key, 'held', -amount) end
        if what == 'add' and used > 0 then open(key, window) end
        if redis.call('EXISTS', key) == 1 then redis.call('HINCRBY', key, 'used', used) end
    end
end
return 1
