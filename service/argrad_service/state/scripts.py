"""What must happen in one step inside Redis, in Lua; times are the server's, so that replicas' clocks do not matter."""

CLAIM = """
local found = redis.call('GET', KEYS[1])
if found then return found end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
"""Set a key to its mark ARGV[1] for ARGV[2] ms unless there is something; what is there, if so."""

FINISH = """
local found = redis.call('GET', KEYS[1])
if found and found ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
"""Put ARGV[2] for ARGV[3] ms in place of the mark ARGV[1], or of nothing."""

ABANDON = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
"""Remove the mark ARGV[1] if it is there."""

TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local cost, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = tonumber(redis.call('GET', KEYS[1]) or 0)
if known > now + 1.001 * burst then known = now end
local full_at = math.max(known, now) + cost
local wait = full_at - now - burst
if wait > 1e-6 + 1e-9 * burst then return string.format('%.6f', wait) end
redis.call('SET', KEYS[1], string.format('%.6f', full_at), 'PX', math.ceil(1000 * (full_at - now)) + 1000)
return '0'
"""
"""`MemoryRateCounter.take`, with cost and burst in seconds."""

BEAT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[3]))) do
  redis.call('ZREM', KEYS[1], gone)
  redis.call('HDEL', KEYS[2], gone)
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return redis.call('HVALS', KEYS[2])
"""
"""Note that replica ARGV[1], described by ARGV[2], lives; those that do, without who said nothing for ARGV[3] ms."""
