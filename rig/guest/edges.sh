# Tests controllers that share a group, one with a single queue pair, and more vectors than are available.
A=nvme://$(slot 8)/1 B=nvme://0000:00:08.1/1 one=nvme://$(slot 9)/1
same_group() { # drives both at once, in one process
	[ "$(readlink /sys/bus/pci/devices/$(slot 8)/iommu_group)" = "$(readlink /sys/bus/pci/devices/0000:00:08.1/iommu_group)" ] || { echo "not in one group"; return 77; }
	pumice bdev list $A $B && pumice bdev verify $A $B
}
many() { # drives eight controllers of 65 vectors each on two processors
	uris=""
	for n in 10 11 12 13 14 15; do uris="$uris nvme://$(slot $n)/1"; done
	pumice bdev list $A $B $uris
}
step "two controllers of one group" same_group
step "one queue pair" pumice bdev verify $one
step "more vectors than processors have" many
step "verify, one queue pair" pumice-rig test verify $one
