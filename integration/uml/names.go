package uml

import "blockferry/integration/vm"

// Names of package vm.
type (
	Host   = vm.Host
	Spec   = vm.Spec
	Disk   = vm.Disk
	Set    = vm.Set
	Member = vm.Member
)

const (
	Dir = vm.Dir
	Etc = vm.Etc
)

var (
	ErrNoGuest    = vm.ErrNoGuest
	Init          = vm.Init
	Inside        = vm.Inside
	Boot          = vm.Boot
	GuestPath     = vm.GuestPath
	Reboot        = vm.Reboot
	RebootInOrder = vm.RebootInOrder
	Modprobe      = vm.Modprobe
	ModprobeWith  = vm.ModprobeWith
)
