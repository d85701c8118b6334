#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Moves the reservations of holders that have expired to `used`, with what each had spent.
local function expire_holders(key)
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', key .. ':h', '-inf', now)) do
        local id, amount = string.match(member, '^(.*):(%d+)$')
        local spent = redis.call('HGET', key, id) or 0
        redis.call('HINCRBY', key, 'held', -amount)
        redis.call('HINCRBY', key, 'used', spent)
        redis.call('HSET', key, 'paid:' .. id, spent)
        redis.call('ZREM', key .. ':h', member)
    end
end

-- The holder is alive after all: undoes what expire_holders has charged for it.
local function undo_expiry(key, id)
    local paid = redis.call('HGET', key, 'paid:' .. id)
    if not paid then return end
    redis.call('HINCRBY', key, 'used', -paid)
    redis.call('HDEL', key, 'paid:' .. id)
end

-- Returns the content of the counter, and the milliseconds until it is below `limit`: a server with a higher limit may
-- have added more. Where the clock has gone back (or another server has taken over), entries of the future are moved to
-- now, or they would count for too long.
local function read(kind, key, window, limit)
    if kind == 'moving' then
        for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. now, '+inf')) do
            redis.call('ZADD', key, now, member)
        end
        redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
        local count = redis.call('ZCARD', key)
        local first = math.max(0, count - limit)
        local leaving = redis.call('ZRANGE', key, first, first, 'WITHSCORES')[2]
        return count, leaving and leaving + window - now or 0
    elseif kind == 'fixed' then
        local ends = tonumber(redis.call('HGET', key, 'ends') or 0)
        if ends <= now then
            redis.call('DEL', key, key .. ':h')
            return 0, window
        elseif ends > now + window then
            ends = now + window
            redis.call('HSET', key, 'ends', ends)
        end
        expire_holders(key)
        local used = redis.call('HMGET', key, 'used', 'held')
        return (used[1] or 0) + (used[2] or 0), ends - now
    end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    return redis.call('ZCARD', key), 0
end

local function open(key, window)
    if redis.call('EXISTS', key) == 1 then return end
    redis.call('HSET', key, 'used', 0, 'held', 0, 'ends', now + window)
    redis.call('PEXPIRE', key, window)
end

local function hold_tokens(key, id, amount, spent, hold, window)
    local member = id .. ':' .. amount
    open(key, window)
    redis.call('HSET', key, id, spent)
    if not redis.call('ZSCORE', key .. ':h', member) then redis.call('HINCRBY', key, 'held', amount) end
    redis.call('ZADD', key .. ':h', now + hold, member)
    redis.call('PEXPIRE', key .. ':h', window)
end

local function hold_lease(key, id, hold)
    redis.call('ZADD', key, now + hold, id)
    redis.call('PEXPIRE', key, hold)
end
