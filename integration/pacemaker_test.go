package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// What a node of a cluster has beside blockferry: the resource agent, Pacemaker's
// configuration, and a fence device whose power switch is the test at the host.
const (
	ocfAgent = "/usr/lib/ocf/resource.d/blockferry/volume"

	// goesOnWithin is how long a client may have to wait for the other node while the machine is busy with
	// other things, too. 12 seconds of it are corosync's here.
	goesOnWithin = 100 * time.Second

	// The device says whom to cut off, and waits until that was done.
	fenceDevice = `#!/bin/sh
action=reboot
while read -r line; do
    case $line in
    action=*) action=${line#*=} ;;
    port=* | plug=* | nodename=*) node=${line#*=} ;;
    esac
done
[ "$1" != -o ] || action=$2
case $action in
metadata)
    cat <<'END'
<?xml version="1.0"?>
<resource-agent name="fence_host" shortdesc="the test at the host">
<longdesc>It cuts the power of a guest.</longdesc><vendor-url/>
<parameters>
<parameter name="action" unique="0" required="1"><content type="string" default="reboot"/><shortdesc lang="en">what to do</shortdesc></parameter>
<parameter name="port" unique="0" required="0"><content type="string"/><shortdesc lang="en">the node</shortdesc></parameter>
</parameters>
<actions><action name="on"/><action name="off"/><action name="reboot"/><action name="status"/><action name="list"/><action name="monitor"/><action name="metadata"/></actions>
</resource-agent>
END
    ;;
off | reboot)
    mkdir -p /run/fence
    rm -f /run/fence/done
    echo "$node" >/run/fence/want
    until [ -e /run/fence/done ]; do sleep 0.1; done
    ;;
esac
exit 0
`

	// Tokens get through in time on a busy machine with one CPU for each guest. A node that is lost is missed
	// after the token's time, and the other one goes on alone after the consensus', which is short of
	// two nodes alone (docs/pacemaker.md).
	corosyncFile = `totem {
	version: 2
	cluster_name: test
	transport: udpu
	token: 10000
	consensus: 2000
}
nodelist {
	node {
		ring0_addr: %s
		name: node-a
		nodeid: 1
	}
	node {
		ring0_addr: %s
		name: node-b
		nodeid: 2
	}
}
quorum {
	provider: corosync_votequorum
	two_node: 1
}
system {
	sched_rr: no
}
logging {
	to_stderr: yes
}
`

	// A node that starts takes 5 seconds for finding nobody to lead, not 20.
	clusterOptions = `<crm_config><cluster_property_set id="options">
<nvpair id="options-stonith" name="stonith-enabled" value="true"/><nvpair id="options-deadtime" name="dc-deadtime" value="5s"/>
</cluster_property_set></crm_config>`

	clusterFence = `<resources><primitive id="fence" class="stonith" type="fence_host"><instance_attributes id="fence-attributes">
<nvpair id="fence-list" name="pcmk_host_list" value="node-a node-b"/><nvpair id="fence-check" name="pcmk_host_check" value="static-list"/>
</instance_attributes><operations>
<op id="fence-start" name="start" interval="0" timeout="120s"/><op id="fence-monitor" name="monitor" interval="0" timeout="120s"/>
</operations></primitive></resources>`
)

// withAgent adds the resource agent to a guest's files.
func withAgent(files map[string]string) map[string]string {
	if agent, err := os.ReadFile("../deploy/ocf/volume"); err == nil { // in the guest it is there
		files[ocfAgent] = string(agent)
	}
	return files
}

// needs skips a test where a program is missing, unless that is a failure.
func needs(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil && os.Getenv(requireVar) == "" && !uml.Inside() {
			t.Skip(err)
		}
	}
}

// The resource agent does what the standard wants, by the standard's own tester.
func TestPacemakerTester(t *testing.T) {
	needs(t, "ocf-tester", "xmllint")
	inGuest(t, guest{Systemd: true, Files: withAgent(logs(map[string]string{})), Memory: "1200M", Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 12 * time.Minute}, func(t *testing.T) {
		a, b := installedTwins(t, "")
		run(t, "chmod", "755", ocfAgent)
		out, err := tryRun(t, "ocf-tester", "-n", "data", "-o", "volume=data", ocfAgent)
		if err != nil || !strings.Contains(out, "passed all tests") {
			t.Errorf("%v\n%s", err, out)
		}
		a.await(t, "secondary", 3*time.Minute, isSecondary)
		if err := b.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	})
}

// clusterMembers are guests for two nodes of a cluster that serve what is on the volume, and a client.
func clusterMembers(t *testing.T) []member {
	t.Helper()
	files := logs(map[string]string{"/etc/corosync/corosync.conf": fmt.Sprintf(corosyncFile, vm.MemberAddress(0), vm.MemberAddress(1)), "/usr/sbin/fence_host": fenceDevice})
	if !uml.Inside() {
		examples, err := filepath.Glob("../deploy/nfs/*")
		if err != nil || len(examples) == 0 {
			t.Fatalf("%q, %v", examples, err)
		}
		for _, path := range examples {
			files["/usr/share/doc/blockferry/examples/nfs/"+filepath.Base(path)] = mustRead(t, path)
		}
	}
	g := guest{Memory: "900M", Modules: []string{"nfsd"}, Disks: []disk{{Size: farDisk}}, Timeout: 12 * time.Minute, Systemd: true, Files: withAgent(files)}
	client := guest{Memory: "300M", Modules: []string{"nfsv4"}, Timeout: 12 * time.Minute}
	return []member{{"node-a", g}, {"node-b", g}, {"client", client}}
}

// fences does for a fence device what it is asked to, if it is, and says whose power was cut.
func (n *farNode) fences() (fenced string) {
	n.t.Helper()
	out, _ := n.sh("cat /run/fence/want 2>/dev/null")
	if fenced = strings.TrimSpace(out); fenced == "" {
		return ""
	}
	n.members[fenced].Cut()
	n.shell("rm /run/fence/want && touch /run/fence/done")
	n.logf("%s: has %s fenced", n.name, fenced)
	return fenced
}

// clusterStart has a node be one of the cluster.
const clusterStart = "set -e\nchmod 755 /usr/sbin/fence_host " + ocfAgent + `
systemd-tmpfiles --create --prefix=/run/crm --prefix=/run/resource-agents
cib=/var/lib/pacemaker/cib/cib.xml
cibadmin --empty >$cib
CIB_file=$cib cibadmin --modify --allow-create --scope crm_config --xml-text '` + clusterOptions + `'
chown hacluster:haclient /var/lib/pacemaker/cib/*
systemctl start corosync.service pacemaker.service`

// joined has nodes be those of the cluster, at once.
func joined(nodes ...*farNode) {
	var on []*vm.Member
	for _, n := range nodes {
		on = append(on, n.members[n.name])
	}
	nodes[0].must(vm.Each(on, func(m *vm.Member) error {
		var d shDone
		if err := m.Call(taskLimit, "sh", clusterStart, &d); err != nil || d.Code != 0 {
			return errors.Join(err, fmt.Errorf("guest %s, the cluster's start: exit code %d\n%s", m.Name, d.Code, d.Out))
		}
		return nil
	}))
}

// inOneTag joins words that one XML tag has, in any order.
const inOneTag = "|"

func hasTag(xml, words string) bool {
	for tag := range strings.SplitSeq(xml, ">") {
		if !slices.ContainsFunc(strings.Split(words, inOneTag), func(w string) bool { return !strings.Contains(tag, w) }) {
			return true
		}
	}
	return false
}

// awaitCluster waits until what the cluster says of itself has some words.
func (n *farNode) awaitCluster(limit time.Duration, words ...string) {
	n.t.Helper()
	out := ""
	for deadline := time.Now().Add(limit); ; time.Sleep(200 * time.Millisecond) {
		out, _ = n.sh("crm_mon --one-shot --output-as=xml 2>&1")
		missing := ""
		for _, w := range words {
			if !hasTag(out, w) {
				missing = w
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: '%s' is missing: %s", n.name, missing, out)
		}
	}
}

// A cluster that Pacemaker runs by the manual's page serves NFS from where it has the volume promoted. A
// client with a hard mount goes on without a new one when the volume is moved, with nothing lost, and when
// the primary's machine loses its power: Pacemaker fences that, and has the other one take over with all
// that status had claimed, and nothing torn. In the long form (BLOCKFERRY_ROUNDS=2) the old primary
// joins again, and waits for the operator's word.
func TestPacemakerNFS(t *testing.T) {
	needs(t, "corosync", "pacemakerd", "crm_mon", "cibadmin", "rpc.nfsd", "mount.nfs4")
	inGuests(t, clusterMembers(t), pairTasks(), pacemakerNFS)
}

func pacemakerNFS(t *testing.T, g *guests) {
	blocks, err := readWalk("../docs/pacemaker.md")
	g.must(err)
	p := &haPair{walker: &walker{g, "../docs/pacemaker.md", strings.NewReplacer(pairAddresses...), blocks}}
	p.client = &farNode{guests: g, name: "client"}
	a, b := farTwins(g, "", "stall-limit: 20s")
	p.a, p.b = a, b
	defer p.explain("corosync", "pacemaker", "srv-data.mount", "nfsdcld", "nfs-server")
	defer func() {
		for name, m := range g.members {
			var d shDone
			if t.Failed() && m.Call(endLimit, "sh", "grep -v 'info:' /var/log/pacemaker/pacemaker.log | tail -200", &d) == nil {
				t.Logf("%s's Pacemaker:\n%s", name, d.Out)
			}
		}
	}()
	for _, n := range []*farNode{a, b} { // as two machines are
		n.shell("hostname " + n.name + " && mount -t tmpfs tmpfs /srv")
	}
	joined(a, b)
	// One that starts long after the other is unclean until then, and would be fenced as soon as
	// there is a device: nobody cuts it off yet.
	online := func(node string) string {
		return strings.Join([]string{`<node name="` + node + `" `, ` online="true"`, ` unclean="false"`, ` pending="false"`}, inOneTag)
	}
	a.awaitCluster(2*farWait, online("node-a"), online("node-b"), `with_quorum="true"`)
	a.shell("cat >/run/fence.xml <<'END'\n" + clusterFence + "\nEND\ncibadmin --modify --allow-create --scope resources --xml-file /run/fence.xml")
	p.walk("Moving the server")
	isUp := func(v status.Volume) bool { return v.Up }
	var now, then *farNode
	for end := time.Now().Add(farWait); now == nil; time.Sleep(200 * time.Millisecond) {
		if v, _, known := a.look(); known && v.Up {
			now, then = a, b
		} else if v, _, known := b.look(); known && v.Up {
			now, then = b, a
		}
		if time.Now().After(end) {
			a.awaitCluster(0, "a promoted instance")
		}
	}
	g.logf("%s is promoted", now.name)
	// mount tries again until there is a server.
	p.client.shell("mkdir /mnt/files && mount -t nfs4 -o vers=4.2,hard " + vm.MemberAddress(19) + ":/ /mnt/files")
	const here, there = "/mnt/files/records", "/srv/data/share/records"
	p.writes(here, true)
	now.await("up to date", farWait, upToDate)

	// As planned.
	begun := time.Now()
	p.walk("")
	g.logf("MEASURED the commands that move it took %v", time.Since(begun).Round(10*time.Millisecond))
	then.await("promoted", farWait, isUp)
	p.goesOn(p.client.written().Acked + 20)
	acked := p.client.written().Acked
	if held := p.records(then, there); len(held) != 1 || held[0].From != 1 || held[0].To < acked {
		t.Errorf("after a planned move %v are there of records 1 to %d", held, acked)
	}
	now, then = then, now
	then.await("secondary", farWait, isSecondary)
	now.await("up to date", farWait, upToDate)
	then.awaitCluster(farWait, `role="Promoted"`, `role="Unpromoted"`)

	// The power of the primary's machine is cut.
	if asked, _ := then.sh("cat /run/fence/want 2>/dev/null"); asked != "" {
		t.Fatalf("'%s' is to be fenced, and nothing is wrong yet", asked)
	}
	seen, claimed := now.watchWriter(p.client, 3*time.Second)
	g.members[now.name].Cut()
	cut := time.Now()
	last := p.client.written().Acked
	fenced, wanted, promoted := "", time.Duration(0), time.Duration(0)
	for ; p.client.written().Acked == last; time.Sleep(50 * time.Millisecond) {
		took := time.Since(cut)
		if f := then.fences(); f != "" {
			fenced, wanted = f, took
		}
		if promoted == 0 {
			if v, _, known := then.look(); known && v.Up {
				promoted = took
			}
		}
		if took > farWait {
			then.awaitCluster(0, "a client that goes on")
		}
	}
	took := time.Since(cut)
	g.logf("MEASURED after the power cut: %v until the node is to be fenced, %v until %s is promoted, %v until the client goes on", wanted.Round(10*time.Millisecond), promoted.Round(10*time.Millisecond), then.name, took.Round(10*time.Millisecond))
	if took > goesOnWithin {
		t.Errorf("the client went on after %v", took)
	}
	if fenced != now.name {
		t.Errorf("'%s' was fenced", fenced)
	}
	p.goesOn(last + 20)
	p.lost(then, seen, last, claimed, there)
	g.logf("%s says: %s", then.name, then.shell("grep -h 'takes over' "+uml.Dir+"/agent.log | tail -1"))

	if powerNumber(t, roundsVar, 1) == 1 {
		return
	}
	// The long form. It comes back, and what only it has is kept until the operator gives it up.
	g.boot(now.name)
	now.begin(false)
	joined(now)
	now.await("secondary", farWait, func(v status.Volume) bool { return isSecondary(v) && v.Position != nil })
	then.awaitCluster(farWait, `role="Promoted"`, `role="Unpromoted"`)
	if back := then.await("aware of it", farWait, func(v status.Volume) bool {
		return upToDate(v) || strings.Contains(v.Replicas[0].Reason, "split brain")
	}); !upToDate(back) {
		now.run("discard")
	}
	then.await("up to date", farWait, upToDate)
	then.run("verify")
}
