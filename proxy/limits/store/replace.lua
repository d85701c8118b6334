#!lua flags=allow-oom
-- Replaces the rules if they are the expected ones (compare-and-set keeps the changes of two operators).
-- KEYS: the rules. ARGV: the expected value, the new value.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
