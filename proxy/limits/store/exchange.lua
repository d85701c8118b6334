#!lua flags=allow-oom
-- Stores new revoked ids, and returns those of the others and the rules. Runs on a full store as well (allow-oom), since
-- a logout must be stored.
-- KEYS: the revoked ids, the rules. ARGV: read since (ms), how long ids stay (ms), page size, new ids.
-- A page ends with all ids of its last millisecond, so that the next page begins after it.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for n = 4, #ARGV do redis.call('ZADD', KEYS[1], now, ARGV[n]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local entries = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[3])
if #entries == 2 * ARGV[3] then entries = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], entries[#entries], 'WITHSCORES') end
return {now, entries, redis.call('GET', KEYS[2])}
