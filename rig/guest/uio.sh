# Tests a plain controller without an IOMMU: the suite, and a process that is killed.
device=nvme://$(slot 8)
config=/sys/bus/pci/devices/$(slot 8)/config
bus_master() { # returns whether the function may transfer (command register, bit 2)
	command=$(dd if=$config bs=1 skip=4 count=1 2> /dev/null | od -An -tu1)
	[ $((command / 4 % 2)) = 1 ]
}
killed() { # a killed process leaves a device that writes nowhere and can be opened again
	nvme-suite $device/1 --filter default/ > /dev/null 2>&1 & p=$!
	for n in 1 2 3 4 5 6 7 8 9 10; do bus_master || sleep 0.5; done
	bus_master || { echo "never up"; return 1; }
	sleep 1
	kill -9 $p
	wait $p 2> /dev/null
	sleep 0.5
	bus_master && { echo "the killed process left bus mastering on"; return 1; }
	pumice-rig test verify $device/1
}
step "verify, 512 B" pumice-rig test verify $device/1
step "a killed process" killed
step "verify, 4096 B" pumice-rig test verify $device/2
suite "on a plain controller" $device --filter default/
