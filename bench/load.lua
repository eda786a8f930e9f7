-- Sends the requests of a file one after another, over and over: `wrk -s load.lua URL -- FILE [PAUSE [own]]`.
-- own: each thread of wrk, which then has one connection, sends one request of its own, as an agent does.
-- PAUSE: milliseconds, on average, that a connection waits before each request. The file holds each request behind a line with its length, so that wrk has nothing to compute.
local requests, at, threads = {}, 0, 0
local own = false

function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

function init(args)
    local file = assert(io.open(args[1], "rb"))
    while true do
        local length = file:read("*l")
        if not length then break end
        requests[#requests + 1] = file:read(tonumber(length))
    end
    file:close()
    local pause = tonumber(args[2] or 0)
    own = args[3] == "own"
    if pause > 0 then
        function delay() return pause * (0.5 + math.random()) end
    end
end

function request()
    at = own and number % #requests + 1 or at % #requests + 1
    return requests[at]
end
