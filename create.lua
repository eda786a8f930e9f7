local n=0; local t=0
function setup(thread) thread:set("id",t); t=t+1 end
wrk.method="POST"; wrk.headers["Content-Type"]="application/json"; wrk.headers["Authorization"]="Bearer dbt_admin_token_for_bench_000000"
function request() n=n+1; return wrk.format(nil,nil,nil,'{"repo":"myorg/app","ref":"b'..n..'","host":"h-'..(n%100)..'"}') end
