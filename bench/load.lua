-- Sends the requests of a file one after another, over and over: `wrk -s load.lua URL -- FILE`.
-- The file holds each request behind a line with its length, so that wrk has nothing to compute.
local requests, at = {}, 0

function init(args)
    local file = assert(io.open(args[1], "rb"))
    while true do
        local length = file:read("*l")
        if not length then break end
        requests[#requests + 1] = file:read(tonumber(length))
    end
    file:close()
end

function request()
    at = at % #requests + 1
    return requests[at]
end
