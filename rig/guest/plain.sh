# Tests one controller with two block sizes. Under uio there are no interrupts.
plain=nvme://$(slot 8)
step "verify, 512 B" pumice-rig test verify $plain/1 --sgl
step "verify, 4096 B" pumice-rig test verify $plain/2
# Without interrupts the suite's variants differ little, and each takes long.
[ "$(option mode)" = uio ] && shape="--filter default/"
suite "on all namespaces" $plain $shape
