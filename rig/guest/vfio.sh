# Tests all kinds of namespaces, and events of devices: see MULTI in src/scenario.rs.
multi=nvme://$(slot 8)
faulty=nvme://$(slot 9)/1
slow=nvme://$(slot 11)/1
t() { pumice-rig test "$@"; }
step "metadata and zoned namespaces are refused" t namespaces $multi 1:512,2:4096,3:refused,4:refused,5:512
step "verify, 512 B" t verify $multi/1 --no-shadow
step "verify, 4096 B, shadow doorbells" t verify $multi/2
step "verify, SGL" t verify $multi/2 --sgl --no-shadow
step "verify, queue in controller memory" t verify $multi/2 --cmb --no-shadow
step "verify, polling" t verify $multi/1 --poll
suite "on all namespaces" $multi
step "sleep on the interrupt" t sleep $slow
step "media errors" t media-errors $faulty 2048 4096
in_use() { # a second process is told which process has the device
	pumice-rig test sleep $slow & p=$!
	sleep 1
	t verify $slow > /tmp/second && return 1
	cat /tmp/second
	wait $p && grep "in use: process $p (pumice-rig) has /dev/vfio/" /tmp/second
}
step "one process at a time" in_use
step "reset under load" t reset $slow
step "removal under load" t removal nvme://0000:01:00.0/1 n2
