-- Charges all counters or none.
-- KEYS: the holder's mark, then the counters. ARGV: the holder's id, how long it holds (ms), what it has spent, 1 if an
-- earlier call of it may have been booked, then for each counter: kind, amount, limit, window (ms).
-- Returns 1 or 0 for charged or not, then for each counter: its content before, and ms until some of that is free.
-- A holder that has ended gets {0}: the call was delayed, and its answer is no longer needed.
local id, hold, spent, again = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4] == '1'
local booked, answer = 1, {1}

-- The amount of an earlier call: it is part of the content, and is not to be charged once more.
local function booked_before(kind, key, amount)
    if not again then return 0 end
    local set, member = key, id
    if kind == 'fixed' then set, member = key .. ':h', id .. ':' .. amount end
    return redis.call('ZSCORE', set, member) and amount or 0
end

if redis.call('EXISTS', KEYS[1]) == 1 then return {0} end
for n = 2, #KEYS do
    local key, at = KEYS[n], 5 + (n - 2) * 4
    local limit = tonumber(ARGV[at + 2])
    local used, free = read(ARGV[at], key, tonumber(ARGV[at + 3]), limit)
    used = used - booked_before(ARGV[at], key, tonumber(ARGV[at + 1]))
    if used + ARGV[at + 1] > limit then booked = 0 end
    answer[#answer + 1], answer[#answer + 2] = used, free
end
answer[1] = booked
if booked == 0 then return answer end
for n = 2, #KEYS do
    local key, at = KEYS[n], 5 + (n - 2) * 4
    local kind, amount, window = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 3])
    if kind == 'moving' and amount > 0 then
        redis.call('ZADD', key, now, id)
        redis.call('PEXPIRE', key, window)
    elseif kind == 'fixed' and amount > 0 then
        hold_tokens(key, id, amount, spent, hold, window)
    elseif kind == 'held' and amount > 0 then
        hold_lease(key, id, hold)
    end
end
return answer
